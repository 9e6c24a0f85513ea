"""Objectives on the sampled tokens: one short function each, from signals to token advantages [B, T].

The loss is -sum(A_t log p(y_t)) with A_t detached, so each function is the policy gradient of its source. On the sampled token
d = log T - log S is the difference of teacher and student. Values outside the mask mean nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.method.objective.gates import shift_left
from pipeline.method.objective.signals import Signals, check_like, check_mask, needed

if TYPE_CHECKING:
    from pipeline.config import Objective, Weights


def delta(signals: Signals) -> Tensor:
    """d = log T - log S of the sampled tokens -> [B, T] nats, 0 outside the mask."""
    return (signals.teacher_logprobs - signals.student_logprobs).masked_fill(~signals.mask, 0)


def grpo(signals: Signals) -> Tensor:
    """A, the same for every token of a trace -> [B, T]."""
    return signals.advantage[:, None].expand(signals.mask.shape)


def magnitude(teacher_logprobs: Tensor, student_logprobs: Tensor, direction: Tensor, epsilon: float) -> Tensor:
    """w = clip(exp(D (log p_T - log p_S)), 1 - eps, 1 + eps) (2605.13255, Eq. 2).

    Log-probs [B, T] nats, direction D [B] in {-1, 0, 1} -> [B, T]. Raises ValueError on shapes that differ.
    """
    check_like("student_logprobs", student_logprobs, teacher_logprobs)
    if direction.shape != teacher_logprobs.shape[:1]:
        raise ValueError(f"direction: shape {tuple(direction.shape)}, expected [B] of {tuple(teacher_logprobs.shape)}")
    delta = teacher_logprobs - student_logprobs
    return torch.exp(direction[:, None] * delta).clamp(1 - epsilon, 1 + epsilon)


def rlsd(signals: Signals, constants: Objective) -> Tensor:
    """A ((1 - lam) + lam w) (RLSD, 2604.03128) -> [B, T]; lam falls linearly to 0 over `rlsd_decay_steps` (0: it stays)."""
    decay = constants.rlsd_decay_steps
    lam = constants.rlsd_lam * (max(0.0, 1 - signals.step / decay) if decay else 1.0)
    return grpo(signals) * ((1 - lam) + lam * _magnitude(signals, constants))


def gated(signals: Signals, constants: Weights) -> Tensor:
    """A w (2605.13255, Eq. 7 without its gate) -> [B, T]: `egrsd` and `cl_egrsd`, which differ in their own gate."""
    return grpo(signals) * _magnitude(signals, constants)


def position_weight(mask: Tensor, least: float, tau: float, scale: float) -> Tensor:
    """least + (1 - least) sigmoid(((t - .5) / T - tau) / scale), t = 1 .. T within the trace (PW-OPSD, 2605.21606).

    mask [B, T] bool -> [B, T] float32 in [least, 1]: later tokens weigh more, whatever their entropy.
    """
    check_mask(mask)
    place = (mask.cumsum(1) - 0.5) / mask.sum(1, keepdim=True).clamp(min=1)
    return least + (1 - least) * torch.sigmoid((place - tau) / scale)


def position(signals: Signals, constants: Objective) -> Tensor:
    """A w times `position_weight`, the rival explanation of the gain (PW-OPSD, 2605.21606) -> [B, T]."""
    place = position_weight(signals.mask, constants.position_min, constants.position_tau, constants.position_scale)
    return grpo(signals) * _magnitude(signals, constants) * place


def opd(signals: Signals) -> Tensor:
    """d, the policy gradient of the reverse KL from student to teacher (on-policy distillation, 2601.02780) -> [B, T]."""
    return delta(signals)


def reward_opd(signals: Signals, constants: Objective) -> Tensor:
    """A + coefficient d, the task reward with on-policy distillation (2601.02780) -> [B, T]."""
    return grpo(signals) + constants.opd_coefficient * delta(signals)


def iw_opd(signals: Signals, constants: Objective) -> Tensor:
    """d (1 + g (1 - sum_{i<t} |a_i| / sum_i |a_i|)), a = log T - log rollout (2606.22600) -> [B, T].

    The less of the trace's disagreement lies before a token, the more it weighs. A trace without any has the factor 1 + g.
    """
    rollout = needed("rollout_logprobs", signals.rollout_logprobs, "iw_opd")
    gap = (signals.teacher_logprobs - rollout).masked_fill(~signals.mask, 0).abs()
    total = gap.sum(1, keepdim=True)
    before = (gap.cumsum(1) - gap) / torch.where(total > 0, total, 1)
    return delta(signals) * (1 + constants.iw_growth * (1 - before))


def sdar(signals: Signals, constants: Objective) -> Tensor:
    """A + coefficient sigmoid(slope d) (2605.15155) -> [B, T].

    The source minimises sigmoid(slope d) (log T - log S) with a detached sigmoid. Its gradient raises log S by the sigmoid alone.
    """
    return grpo(signals) + constants.sdar_coefficient * torch.sigmoid(constants.sdar_slope * delta(signals))


def minillm(signals: Signals, constants: Objective) -> Tensor:
    """sum_{i>=t} g^(i-t) d_i, with `minillm_mean` divided by sum_{i>=t} g^(i-t) (MiniLLM, 2306.08543) -> [B, T]."""
    returns = discounted(delta(signals), constants.minillm_gamma)
    if not constants.minillm_mean:
        return returns
    return returns / discounted(signals.mask.to(returns), constants.minillm_gamma).clamp(min=1)


def sft(signals: Signals) -> Tensor:
    """1: cross-entropy on traces that somebody else wrote -> [B, T]."""
    return torch.ones_like(signals.teacher_logprobs)


def discounted(values: Tensor, gamma: float) -> Tensor:
    """sum_{i>=t} gamma^(i-t) values_i -> [B, T]. values [B, T] are 0 outside the mask. Takes log2 T steps."""
    total, step = values, 1
    while step < values.shape[1]:
        total = total + gamma**step * shift_left(total, step, fill=0.0)
        step *= 2
    return total


def _magnitude(signals: Signals, constants: Weights) -> Tensor:
    return magnitude(signals.teacher_logprobs, signals.student_logprobs, signals.advantage.sign(), constants.epsilon)
