"""A round in which traces share prompts, for the tests of packing."""

from __future__ import annotations

import numpy as np
from training_rounds import make_round

from pipeline.training import batches
from pipeline.training.batches import RoundTable, Traces

GROUPS = (4, 3, 1, 1, 3)


def shared_round(number: int = 0, groups: tuple[int, ...] = GROUPS, prompt: tuple[int, int] = (3, 14)) -> RoundTable:
    """A round of groups of traces. Lengths of prompts are drawn from `prompt`."""
    rng = np.random.default_rng([7, number])
    prompts = [rng.integers(4, 57, rng.integers(*prompt)).tolist() for _ in groups]
    of_each = [tokens for tokens, size in zip(prompts, groups, strict=True) for _ in range(size)]
    return make_round(number, sum(groups), prompt_tokens=of_each)


def shared_traces(**more: tuple[int, ...]) -> Traces:
    return batches.usable(shared_round(**more), 0)
