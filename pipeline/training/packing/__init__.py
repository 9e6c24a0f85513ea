"""Packed micro-batches: traces of one prompt share its tokens, in one stream without padding."""
