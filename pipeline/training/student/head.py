"""Log-probabilities of the response tokens from hidden states, chunk by chunk, so that `[B, T, V]` never exists.

In half precision a logit near 22 is rounded to eighths, which moves a log-prob by up to .07 nat. Logits are therefore float32,
whatever the dtype of the model is. A GPU accumulates them in float32; a CPU multiplies a float32 copy of the weight.

The coefficient of every token (objective.coefficients) is known before the head runs. The forward pass therefore computes the
gradient of the hidden states as well, while the logits of a chunk exist. Each token costs two matrix products, as with full
logits, but no logits are kept. A divergence from the teacher's most likely tokens needs K targets `[N, K]` instead of one. Its
slopes are made from the same logits (objective.head_gradient_).

Two alternatives were rejected. `torch.nn.functional.linear_cross_entropy` (new in torch 2.13) has weights per class but not per
row. Its `reduction="none"` computes the logits again in the backward pass, which is a third matrix product. The Triton kernels
of cut-cross-entropy and Liger do not run on a CPU. tests/benchmarks/bench_step.py measures them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.fit.footprint import CPU_LOGITS
from pipeline.method.objective import Kept, Surrogate, head_gradient_, weighted_sum
from pipeline.method.objective.divergence import Measure

CACHED = 2**20  # bytes of logits that stay in a processor's cache while all that follows the product is computed


class Head(NamedTuple):
    """The output layer: weight [V, H], bias [V] or None. At most `chunk` tokens have logits at one time.

    scale and cap: what the model does to its logits (pipeline/models/head_form.py); a cap of 0 is none.
    """

    weight: Tensor
    bias: Tensor | None
    chunk: int
    scale: float = 1.0
    cap: float = 0.0


class Divergence(NamedTuple):
    """A divergence from the teacher: its most likely tokens at N positions, the measure, and the named support."""

    kept: Kept
    measure: Measure
    support: str

    def at(self, places: Tensor) -> Divergence:
        """The same at some of the positions, in their order."""
        return self._replace(kept=self.kept.part(places))


class Terms(NamedTuple):
    """What is summed over N tokens: coefficients [N] * log p(targets [N]), and the weighted divergence where there is one.

    With `surrogate` the log-probs decide the slopes. `coefficients` is then one over the denominators of the loss, and the sum is
    that of the surrogate's values.
    """

    targets: Tensor
    coefficients: Tensor
    divergence: Divergence | None = None
    surrogate: Callable[[Tensor], Surrogate] | None = None


def weighted_logprob(hidden: Tensor, head: Head, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of coefficients_n * log p(targets_n), and the log-probabilities log p(targets_n).

    hidden [N, H], targets [N] int64, coefficients [N] float32 without gradient -> scalar float32, [N] float32 nats. The sum
    carries the gradient to `hidden`; the log-probabilities carry none.
    """
    return _WeightedLogprob.apply(hidden, head, targets, coefficients)  # type: ignore[no-any-return]


def with_divergence(
    hidden: Tensor, head: Head, targets: Tensor, coefficients: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of coefficients_n * log p(targets_n) + weights_n * divergence_n, log p(targets_n), and the divergences.

    The arguments are those of `weighted_logprob`; kept.tokens and kept.logprobs are [N, K] -> scalar, [N], [N], float32 nats. The
    sum carries the gradient to `hidden`; the others carry none.
    """
    return _WithDivergence.apply(hidden, head, targets, coefficients, divergence)  # type: ignore[no-any-return]


@torch.no_grad()
def logprobs_of(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """log p(targets_n), [N] float32 nats, without any gradient."""
    head = widened(head)
    logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for part in chunks(len(targets), head):
        logits, _ = logits_of(hidden[part], head)
        chosen = logits.gather(1, targets[part, None])[:, 0]
        logprobs[part] = chosen - logits.logsumexp(dim=-1)
    return logprobs


class _WeightedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Computes `weighted_logprob`, and keeps the gradient [N, H] that it makes while the logits of a chunk exist."""
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        head = widened(head)
        for part in chunks(len(targets), head):
            logprobs[part], gradient[part] = _chunk(hidden[part], head, targets[part], coefficients[part])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(logprobs)
        return weighted_sum(logprobs, coefficients), logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _grad_logprobs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The kept gradient times the gradient of the sum."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total.to(gradient.dtype), None, None, None


class _WithDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, targets: Tensor, coefficients: Tensor, divergence: Divergence
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes `with_divergence`, and keeps the gradient [N, H] as `_WeightedLogprob` does."""
        logprobs, values = (torch.empty(len(targets), dtype=torch.float32, device=hidden.device) for _ in range(2))
        gradient = torch.empty_like(hidden)
        head, kept = widened(head), divergence.kept
        for part in chunks(len(targets), head):
            terms = targets[part], coefficients[part], divergence._replace(kept=kept.part(part))
            logprobs[part], values[part], gradient[part] = _divergent_chunk(hidden[part], head, *terms)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(logprobs, values)
        return weighted_sum(logprobs, coefficients) + weighted_sum(values, kept.weights), logprobs, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
        """The kept gradient times the gradient of the sum."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total.to(gradient.dtype), None, None, None, None


def chunks(tokens: int, head: Head) -> Iterator[slice]:
    """The tokens in chunks of `head.chunk`, and on a CPU of at most CPU_LOGITS bytes of logits."""
    size = rows(head.chunk, len(head.weight), on_cpu=not head.weight.is_cuda)
    return (slice(start, start + size) for start in range(0, tokens, size))


def rows(chunk: int, vocab: int, on_cpu: bool) -> int:
    """Tokens whose logits exist at one time, where `chunk` are allowed."""
    return min(chunk, max(1, CPU_LOGITS // (4 * vocab))) if on_cpu else chunk


def _chunk(hidden: Tensor, head: Head, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) [n] and coefficient * d log p(target) / d hidden [n, H], computed in place on one [n, V] buffer.

    With p = softmax(z): d log p_y / d z = onehot(y) - p, so the gradient is c * (weight_y - p @ weight), times d z / d (W h).
    """
    logits, slope = logits_of(hidden, head)
    logprobs = slopes_(logits, targets, coefficients)
    return logprobs, through(logits, slope, head)


def slopes_(logits: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
    """Turn logits [n, V] into the gradient of sum_n c_n log p(target_n), in place -> log p(target) [n] nats."""
    size = len(logits) if logits.is_cuda else max(1, CACHED // (4 * logits.shape[1]))
    logprobs = [
        _slopes_(part, target[:, None], coefficient[:, None])
        for part, target, coefficient in zip(logits.split(size), targets.split(size), coefficients.split(size), strict=True)
    ]
    return torch.cat(logprobs)


def _slopes_(logits: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
    """log p(target) [n] of logits [n, V], which become the slopes of coefficient * log p(target). The others are [n, 1]."""
    logits -= logits.max(dim=-1, keepdim=True).values
    chosen = logits.gather(1, targets)
    total = logits.exp_().sum(dim=-1, keepdim=True)
    logits *= -coefficients / total
    logits.scatter_add_(1, targets, coefficients)
    return (chosen - total.log()).squeeze(1)


def _divergent_chunk(
    hidden: Tensor, head: Head, targets: Tensor, coefficients: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target) [n], divergences [n], and the gradient [n, H] of `with_divergence`, in place on one [n, V] buffer.

    The buffer ends with this function, so that two chunks never have one at the same time.
    """
    logits, slope = logits_of(hidden, head)
    logprobs, values = head_gradient_(logits, targets, coefficients, *divergence)
    return logprobs, values, through(logits, slope, head)


def through(gradient: Tensor, slope: Tensor | float, head: Head) -> Tensor:
    """A gradient of logits [n, V] as one of hidden states [n, H]. It changes the gradient. slope: d logits / d (W h)."""
    if isinstance(slope, Tensor) or slope != 1:
        gradient *= slope
    return gradient.to(head.weight.dtype) @ head.weight


def widened(head: Head) -> Head:
    """The head with its weight in float32 at least, unless a GPU holds it: `logits_of` needs no copy there."""
    if head.weight.is_cuda:
        return head
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    return head._replace(weight=head.weight.to(wide))


def logits_of(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor | float]:
    """Logits float32 [n, V] of hidden states [n, H], and d logits / d (W h): the scale, or [n, V] with a cap."""
    if head.weight.is_cuda and head.weight.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(hidden.to(head.weight.dtype), head.weight.T, out_dtype=torch.float32)  # float32 where all weights train
    else:
        logits = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight).float()
    if head.bias is not None:
        logits.add_(head.bias)
    if head.scale != 1:
        logits *= head.scale
    if not head.cap:
        return logits, head.scale
    logits.div_(head.cap).tanh_()
    slope = (1 - logits.square()).mul_(head.scale)
    return logits.mul_(head.cap), slope
