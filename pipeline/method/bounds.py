"""The least and the greatest entropy of a next-token distribution of which only the k best log-probabilities are known.

Shapes: `N` positions, `V` vocabulary, `k` kept tokens. Nats, temperature 1. Arrays of numpy: its callers run without torch.
"""

from __future__ import annotations

import numpy as np


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
