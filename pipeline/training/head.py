"""Log-probabilities of the response tokens from hidden states, chunk by chunk, so that `[B, T, V]` never exists.

The coefficient of every token (objective.coefficients) is known before the head runs. The forward pass therefore computes the
gradient of the hidden states as well, while the logits of a chunk exist. That takes two matrix products per token, as with full
logits, and keeps no logits.

What was rejected: `torch.nn.functional.linear_cross_entropy` (new in torch 2.13) has weights per class but not per row, and its
`reduction="none"` computes the logits again in the backward pass, which is a third matrix product. The Triton kernels of
cut-cross-entropy and Liger do not run on a CPU. tests/benchmarks/bench_step.py has the figures.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.method.objective import weighted_sum


class Head(NamedTuple):
    """The frozen output layer: weight [V, H], bias [V] or none, and how many tokens have logits at one time."""

    weight: Tensor
    bias: Tensor | None
    chunk: int


def weighted_logprob(hidden: Tensor, head: Head, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """sum_n coefficients_n * log p(targets_n), and the log p themselves.

    hidden [N, H], targets [N] int64, coefficients [N] float32 without gradient -> scalar float32 that carries the gradient to
    `hidden`, and [N] float32 nats that carry none.
    """
    return _WeightedLogprob.apply(hidden, head, targets, coefficients)  # type: ignore[no-any-return]


class _WeightedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """As `weighted_logprob`; the gradient [N, H] is made here, while a chunk's logits are there, and kept."""
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(targets), head.chunk):
            part = slice(start, start + head.chunk)
            logprobs[part], gradient[part] = _chunk(hidden[part], head, targets[part], coefficients[part])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(logprobs)
        return weighted_sum(logprobs, coefficients), logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _grad_logprobs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The kept gradient times that of the sum."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total.to(gradient.dtype), None, None, None


def _chunk(hidden: Tensor, head: Head, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(target) [n] and coefficient * d log p(target) / d hidden [n, H], in place on one [n, V] buffer.

    With p = softmax(z): d log p_y / d z = onehot(y) - p, so the gradient is c * (weight_y - p @ weight).
    """
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float()
    logits -= logits.max(dim=-1, keepdim=True).values
    chosen = logits.gather(1, targets[:, None])
    total = logits.exp_().sum(dim=-1, keepdim=True)
    logits *= -coefficients[:, None] / total
    logits.scatter_add_(1, targets[:, None], coefficients[:, None])
    return (chosen - total.log()).squeeze(1), logits.to(head.weight.dtype) @ head.weight
