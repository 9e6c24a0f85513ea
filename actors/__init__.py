"""The only owners of an inference engine: vLLM as a plain class, its exact-entropy hook, and the pool of engine actors."""
