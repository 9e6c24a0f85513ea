"""Sampling with top_p and top_k on a CPU: of the k most likely tokens, instead of the whole vocabulary in order.

vLLM sorts all V logits of every row where both are set. With 64 rows of 49 152 logits that took 70 ms of a step of 190 ms.
The kept tokens are the same. Rows with a large k or a tie at an edge go vLLM's way, and so do batches without a k or a p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actors.inference.hooks import replace

_MOST = 1024  # a larger k is left to vLLM's sort


def install() -> bool:
    """Change this process's vLLM, once. False when it has no such place: then it sorts."""
    return replace("vllm.v1.sample.ops.topk_topp_sampler", "apply_top_k_top_p", "sorts_few", _sorting_few)


def _sorting_few(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_top_k_top_p(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
        """Logits [N, V] with -inf for the tokens that top-k and top-p leave out. k int [N] and p float [N], or None."""
        if k is not None:
            k = k.clamp(max=logits.shape[1])  # "no top-k" is the padded vocabulary, of which a teacher has a part
        if k is None or p is None or logits.is_cuda:
            return original(logits, k, p)
        least = least_kept(logits, k.long(), p)
        if len(rest := least.isnan().nonzero()[:, 0]):
            logits[rest] = original(logits[rest], k[rest], p[rest])
        return logits.masked_fill_(logits < least[:, None], -torch.inf)

    return apply_top_k_top_p


def least_kept(logits: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """The least logit [N] that top-k and then top-p keep in each row: -inf where both keep all, NaN where only a sort can tell.

    logits float32 [N, V], k int64 [N], p float32 [N]. Top-p leaves out the least likely of the k tokens, of a mass of at most
    1 - p. It never leaves out the most likely one.
    """
    every = k >= logits.shape[1]  # vLLM's word for no top-k
    least = torch.where(every & (p >= 1), -torch.inf, torch.nan)
    if not len(rows := (k <= min(_MOST, logits.shape[1] - 1)).nonzero()[:, 0]):
        return least
    few = len(rows) < len(logits)
    least[rows] = _least(logits[rows] if few else logits, k[rows], p[rows])
    return least


def _least(logits: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """As `least_kept`, of rows whose k is below the vocabulary."""
    most = int(k.max())
    best = logits.topk(most + 1, dim=-1).values
    ends = best.gather(1, torch.stack([k - 1, k], 1))
    inside = torch.arange(most) < k[:, None]
    upward = best[:, :most].masked_fill(~inside, -torch.inf).flip(1)
    dropped = upward.softmax(-1).cumsum(-1) <= 1 - p[:, None]
    dropped[:, -1] = False
    first = dropped.sum(-1, keepdim=True)
    least = upward.gather(1, first)[:, 0]
    below = upward.gather(1, (first - 1).clamp(min=0))[:, 0]
    tied = (ends[:, 0] == ends[:, 1]) | ((first[:, 0] > 0) & (below == least))  # at the edge of k, or of p
    return least.masked_fill(tied, torch.nan)
