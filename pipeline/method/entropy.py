"""Entropy of next-token distributions: exact from all log-probabilities, or bounds from the k best ones.

Shapes: `N` positions, `V` vocabulary, `k` kept tokens. Nats, temperature 1.
"""

from __future__ import annotations

import numpy as np
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


def bounds(top_logprobs: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest entropy that k kept log-probabilities allow.

    top_logprobs [N, k] nats, the k most likely tokens in any order -> (lower, upper), each [N] float64 nats. Leave out vLLM's
    first column, the sampled token: it is listed twice when it is one of the k, and when it is not, likelier tokens are missing.
    The tail mass r = 1 - sum p lies on V - k tokens, none likelier than the least kept one, p_k. Entropy is greatest when the
    tail is spread evenly. It is least when the tail fills n = floor(r / p_k) tokens of mass p_k and one token of the remainder.
    Where rounding makes such a tail impossible, the lower bound is cut at the upper one.
    Raises ValueError when [N, k] does not fit the vocabulary.
    """
    if top_logprobs.ndim != 2 or not 1 <= top_logprobs.shape[1] <= vocab_size:
        raise ValueError(f"top_logprobs: shape {top_logprobs.shape}, expected [N, k] with k from 1 to vocab_size = {vocab_size}")
    kept = np.exp(top_logprobs.astype(np.float64))
    tail = np.clip(1 - kept.sum(1), 0, 1)
    least = kept.min(1)
    kept_entropy = _plogp(kept).sum(1)
    full_atoms = np.floor(np.divide(tail, least, out=np.zeros_like(tail), where=least > 0))
    remainder = np.clip(tail - full_atoms * least, 0, 1)
    lower = kept_entropy + full_atoms * _plogp(least) + _plogp(remainder)
    rest = vocab_size - top_logprobs.shape[1]
    upper = kept_entropy + _plogp(tail) + tail * np.log(max(rest, 1))
    return np.minimum(lower, upper), upper


def _plogp(p: np.ndarray) -> np.ndarray:
    """-p log p, and 0 at p = 0."""
    return -p * np.log(p, out=np.zeros_like(p), where=p > 0)
