"""Objectives on the teacher's K most likely tokens, and their gradient with respect to logits without a second [N, V] tensor.

A *cell* is a kept token, or the tail: one bucket for all other tokens. There are C = K or K + 1 cells. Log-probs are in nats. A
measure is a sum over cells. It gives the summands [n, C] and their slopes, the derivatives by the student's log-probs, [n, C].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.config import Objective

Measure = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_EMPTY = -60.0  # the log of a tail that rounding left without mass: exp(-60) is 1e-26


class Kept(NamedTuple):
    """The teacher's most likely tokens at N response positions, and what the divergence from them weighs.

    tokens [N, K] int64, distinct in a row; logprobs [N, K] nats; weights [N], already divided by the denominators of the loss.
    """

    tokens: Tensor
    logprobs: Tensor
    weights: Tensor

    def part(self, chosen: slice | Tensor) -> Kept:
        """The same for some of the positions."""
        return Kept(*(values[chosen] for values in self))


def forward_kl(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """T log(T / S), summed over cells: KL(T, S), the objective `fkl`. Slopes are -T. Log-probs [n, C] -> [n, C] twice."""
    mass = teacher.exp()
    return mass * (teacher - student), -mass


def reverse_kl(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """S log(S / T), summed over cells: KL(S, T). Slopes are S (log(S / T) + 1). Log-probs [n, C] -> [n, C] twice."""
    mass = student.exp()
    summands = mass * (student - teacher)
    return summands, summands + mass


def jensen_shannon(teacher: Tensor, student: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """b T log(T / M) + (1 - b) S log(S / M) with M = b T + (1 - b) S, summed over cells (GKD, 2306.13649): `gkd`.

    By convention b = 0 is KL(T, S) and b = 1 is KL(S, T), where the formula would be 0. The scale therefore jumps at the ends.
    Slopes are (1 - b) S log(S / M): what M adds cancels. Log-probs [n, C] -> [n, C] twice.
    """
    if beta in (0, 1):
        return reverse_kl(teacher, student) if beta else forward_kl(teacher, student)
    of_teacher, of_student = (torch.log(teacher.new_tensor(share)) for share in (beta, 1 - beta))
    mixture = torch.logaddexp(teacher + of_teacher, student + of_student)
    own = (1 - beta) * student.exp() * (student - mixture)
    return beta * teacher.exp() * (teacher - mixture) + own, own


def clamped_forward_kl(teacher: Tensor, student: Tensor, clamp: float, num_kept: int) -> tuple[Tensor, Tensor]:
    """min(T log(T / S), clamp), summed over cells: `opsd` (2601.18734), which can be negative. Log-probs [n, C] -> [n, C] twice.

    The source clamps every token of the vocabulary. From `num_kept` kept tokens this is an approximation: of 2 048 tokens .055
    with K = 16 and .119 with K = 100 in the place of .147. The tail is a bucket of many tokens and is not clamped.
    """
    summands, slopes = forward_kl(teacher, student)
    is_cut = summands >= clamp
    is_cut[:, num_kept:] = False
    return summands.masked_fill(is_cut, clamp), slopes.masked_fill(is_cut, 0)


def measure_of(constants: Objective, num_kept: int) -> Measure:
    """The measure of a distributional objective, with `num_kept` tokens at each position."""
    match constants.name:
        case "fkl" | "eopd":
            return forward_kl
        case "gkd":
            return partial(jensen_shannon, beta=constants.gkd_beta)
        case "opsd":
            return partial(clamped_forward_kl, clamp=constants.opsd_clamp, num_kept=num_kept)
    raise ValueError(f"name: objective '{constants.name}' learns from sampled tokens alone")


def log_tail(logprobs: Tensor) -> Tensor:
    """log(1 - sum of the kept probabilities) in float64: logprobs [N, K] nats -> [N].

    The largest probability is subtracted as -expm1(log p), which keeps the small tail of a sure token. It is at least _EMPTY:
    rounding can leave nothing.
    """
    exact = logprobs.double()
    best = exact.max(1, keepdim=True)
    others = exact.exp().scatter(1, best.indices, 0).sum(1)
    return (-torch.expm1(best.values[:, 0]) - others).clamp(min=0).log().clamp(min=_EMPTY)


class Cells(NamedTuple):
    """Values [n] of a measure, and its derivatives by the student's log-probs of kept tokens [n, K] and of the tail [n]."""

    values: Tensor
    slopes: Tensor
    tail_slope: Tensor


def divergence(teacher: Tensor, student: Tensor, student_tail: Tensor, measure: Measure, support: str) -> Cells:
    """A measure over the named support. Log-probs [n, K] of teacher and student, student_tail [n], all in nats.

    tail: the kept tokens, and one bucket for all others. truncated: the kept tokens as they are. renormalised: the kept tokens,
    with both sides divided by their own sums.
    """
    if support == "tail":
        tails = log_tail(teacher).to(teacher.dtype), student_tail.masked_fill(torch.isneginf(student_tail), _EMPTY)
        sides = (torch.cat((side, tail[:, None]), 1) for side, tail in zip((teacher, student), tails, strict=True))
        summands, slopes = measure(*sides)
        return Cells(summands.sum(1), slopes[:, :-1], slopes[:, -1])
    if support == "renormalised":
        summands, slopes = measure(teacher.log_softmax(1), student.log_softmax(1))
        slopes = slopes - student.softmax(1) * slopes.sum(1, keepdim=True)
    elif support == "truncated":
        summands, slopes = measure(teacher, student)
    else:
        raise ValueError(f"support: '{support}', expected tail, renormalised or truncated")
    return Cells(summands.sum(1), slopes, torch.zeros_like(student_tail))


def head_gradient_(
    logits: Tensor, targets: Tensor, coefficients: Tensor, kept: Kept, measure: Measure, support: str
) -> tuple[Tensor, Tensor]:
    """Turn logits [n, V] into the gradient of sum_n (coefficient_n log p(target_n) + weight_n measure_n), in place.

    targets [n], coefficients [n] -> log p(target) [n] nats, values of the measure [n]. With c the total derivatives by log-probs,
    dL/dlogits = scatter(c) - p sum(c). A slope c_tail of the tail reaches its tokens as c_tail p_v / r, r its mass. log r is a
    logsumexp over the logits that were not kept: log(1 - sum p) would lose it. No other [n, V] tensor is made.
    """
    of_target = logits.gather(1, targets[:, None])[:, 0]
    of_kept = logits.gather(1, kept.tokens)
    logits.scatter_(1, kept.tokens, -torch.inf)
    largest = logits.max(1, keepdim=True).values.clamp(min=torch.finfo(logits.dtype).min)
    mass = logits.sub_(largest).exp_().sum(1)  # of the tail, in units of exp(largest)
    tail = largest[:, 0] + mass.log()
    total = torch.logaddexp(tail, of_kept.logsumexp(1))
    student, student_tail = of_kept - total[:, None], tail - total
    found = divergence(kept.logprobs.to(logits.dtype), student, student_tail, measure, support)
    slopes, tail_slope = found.slopes * kept.weights[:, None], found.tail_slope * kept.weights
    everything = slopes.sum(1) + tail_slope + coefficients
    tiny = torch.finfo(logits.dtype).tiny
    logits *= (tail_slope / mass.clamp(min=tiny) - everything * (largest[:, 0] - total).exp())[:, None]
    logits.scatter_(1, kept.tokens, slopes - student.exp() * everything[:, None])
    logits.scatter_add_(1, targets[:, None], coefficients[:, None].to(logits.dtype))
    return of_target - total, found.values
