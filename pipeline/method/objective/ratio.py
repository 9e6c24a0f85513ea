"""Ratios of the trained policy to the log-probs that engines stored: policy clips, importance corrections, KL to the base.

pi_old is what an engine measured, since nothing else is stored. A clip compares with student_logprobs, the policy of the round. A
correction compares with rollout_logprobs, the writer of the trace. Both also contain the gap between engine and trainer (trap 3).
A ratio is therefore not exactly 1 in the first step of an on-policy round. Log-ratios are cut at +-20. No ratio has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.config import Objective

_MOST = 20.0  # nats of a log-ratio; its exp still fits into half precision's exponent range of float32


class Surrogate(NamedTuple):
    """Terms of the loss from the trainer's log-probs, all [N] and detached, before the denominators.

    values: the tokens' terms. slopes: their derivatives by the log-probs. trust: the factor of each token's divergence.
    """

    values: Tensor
    slopes: Tensor
    trust: Tensor


@dataclass(frozen=True, eq=False)
class Ratios:
    """What ratios compare with, for N tokens: weights (A_t), and log-probs in nats; `rows` [N] int64 number their traces.

    rollout is None without a correction, and base without a KL.
    """

    weights: Tensor
    student: Tensor
    rows: Tensor
    rollout: Tensor | None = None
    base: Tensor | None = None


@torch.no_grad()
def surrogate(logprobs: Tensor, stored: Ratios, constants: Objective) -> Surrogate:
    """Clip, correction and KL of an objective from the trainer's log-probs [N] nats.

    The correction multiplies the objective and its divergence. The KL stands beside them and is not corrected.
    """
    values, slopes = _clipped(logprobs, stored, constants)
    trust = torch.ones_like(logprobs)
    if stored.rollout is not None and constants.correction_kind != "off":
        trust = correction(logprobs - stored.rollout, stored.rows, constants.correction_kind, constants.cap)
    values, slopes = values * trust, slopes * trust
    if stored.base is not None and constants.kl_weight:
        values = values + constants.kl_weight * k3(logprobs, stored.base)
        slopes = slopes + constants.kl_weight * (logprobs - stored.base)
    return Surrogate(values, slopes, trust)


def ppo(log_ratio: Tensor, weights: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - low, 1 + high) A) (PPO, 1707.06347), and its derivative by log p: -r A, or 0 where the clip holds.

    log_ratio [N] nats, weights [N] -> [N] twice. With the trace's mean log-ratio at every token this is GSPO (2507.18071).
    """
    ratio = log_ratio.clamp(-_MOST, _MOST).exp()
    plain, cut = -weights * ratio, -weights * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(plain, cut), plain.masked_fill(cut > plain, 0)


def cispo(logprobs: Tensor, log_ratio: Tensor, weights: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-sg(clip(r, 1 - low, 1 + high)) A log p (CISPO, 2506.13585), and its derivative by log p. All [N] -> [N] twice.

    No token loses its gradient: the clip bounds the weight of each.
    """
    slopes = -weights * log_ratio.clamp(-_MOST, _MOST).exp().clamp(1 - low, 1 + high)
    return slopes * logprobs, slopes


def correction(log_ratio: Tensor, rows: Tensor, kind: str, cap: float) -> Tensor:
    """Importance weights of trainer to rollout: log_ratio [N] nats, rows [N] -> [N].

    token: min(r_t, cap). sequence: r of the whole trace, the exp of the sum of its log-ratios; a trace above the cap has 0.
    """
    if kind == "token":
        return log_ratio.clamp(-_MOST, _MOST).exp().clamp(max=cap)
    whole = trace_sums(log_ratio, rows).clamp(-_MOST, _MOST).exp()
    return whole.masked_fill(whole > cap, 0)


def k3(logprobs: Tensor, base: Tensor) -> Tensor:
    """r - 1 - log r with r = base / p: an estimate of KL(p, base) that is never negative. Log-probs [N] nats -> [N] nats.

    It is the value alone. As a loss its gradient would be that of KL(base, p); the derivative that trains is log p - log base,
    the policy gradient of KL(p, base).
    """
    gap = (base - logprobs).clamp(-_MOST, _MOST)
    return gap.exp() - 1 - gap


def trace_sums(values: Tensor, rows: Tensor) -> Tensor:
    """The sum over each token's trace, at every token: values [N], rows [N] int64 -> [N]."""
    if not len(values):
        return values
    return values.new_zeros(int(rows.max()) + 1).index_add_(0, rows, values)[rows]


def _clipped(logprobs: Tensor, stored: Ratios, constants: Objective) -> tuple[Tensor, Tensor]:
    log_ratio, low, high = logprobs - stored.student, constants.clip_low, constants.clip_high
    match constants.ratio_kind:
        case "ppo":
            return ppo(log_ratio, stored.weights, low, high)
        case "gspo":
            mean = trace_sums(log_ratio, stored.rows) / trace_sums(torch.ones_like(log_ratio), stored.rows)
            return ppo(mean, stored.weights, low, high)
        case "cispo":
            return cispo(logprobs, log_ratio, stored.weights, low, high)
    return -stored.weights * logprobs, -stored.weights
