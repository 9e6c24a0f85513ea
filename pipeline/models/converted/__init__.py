"""Models that Python packages ship as GGUF files, converted to folders which transformers and vLLM open."""
