"""Entropy of next-token distributions, exact from all log-probabilities. bounds.py has what the k best ones allow.

Shapes: `N` positions, `V` vocabulary, `k` kept tokens. Nats, temperature 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

# exp(-200) is 0 in fp32, so p = 0 (a log-prob of -inf) adds 0 * -200 = 0. Without the floor, 0 * -inf would be NaN.
_FLOOR = -200.0


def entropy_of(logprobs: Tensor) -> Tensor:
    """H = -sum_v p log p of normalised rows (2605.13255, Eq. 4).

    logprobs [N, V] float nats, -inf allowed -> [N] nats of the same type. A NaN in a row stays a NaN. Rows are computed in
    blocks, so that no second [N, V] tensor exists and a CPU keeps each block in its cache.
    """
    rows = max(1, (1 << 16 if logprobs.device.type == "cpu" else 1 << 24) // logprobs.shape[-1])
    return torch.cat([_block_entropy(block) for block in logprobs.split(rows)])


def _block_entropy(block: Tensor) -> Tensor:
    """Entropy [n] nats of log-probs [n, V]."""
    finite = block.clamp(min=_FLOOR)
    return finite.exp().mul_(finite).sum(-1).neg_()
