"""What is hooked into vLLM where it returns too little, computes wrong or computes too much; each is checked, or falls back."""
