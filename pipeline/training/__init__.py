"""Training: committed shards become tensors (batches), optimiser steps (step, head) and checkpoints, in one Ray Train run."""
