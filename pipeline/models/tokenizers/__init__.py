"""Tokenizers: the one way to load one, reading one without transformers, and whether two agree."""
