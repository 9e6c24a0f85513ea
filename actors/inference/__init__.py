"""One vLLM engine in one process: its start, its self-check, its requests, its adapters, and what is hooked into vLLM."""
