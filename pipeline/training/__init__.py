"""Training: committed shards become tensors (batches), an optimiser step (step, head), a checkpoint, one long Ray Train run."""
