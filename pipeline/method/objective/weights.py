"""Token weights of every objective, and the loss that they make: the loss that is tested is the loss that trains.

Token weights carry no gradient: it flows through the policy's log-probs alone. The optimiser step (training/step.py) calls
`token_weights`, `divergence_weights` and `coefficients`, its head `weighted_sum`, and `loss` is made of the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.method.objective import sampled
from pipeline.method.objective.gates import confidence
from pipeline.method.objective.signals import Signals, check_like, check_mask

if TYPE_CHECKING:
    from pipeline.config import Objective


@torch.no_grad()
def token_weights(signals: Signals, constants: Objective) -> Tensor:
    """Token advantages A_t of the objective `constants.name`, times its gate -> [B, T], detached, finite, 0 outside the mask.

    They are 0 where an objective learns from distributions alone. Raises ValueError for an unknown name or a missing signal.
    """
    weights = _sampled(signals, constants)
    if constants.gate_kind != "off":
        weights = weights * confidence(signals, constants)
    return weights.masked_fill(~signals.mask, 0)


@torch.no_grad()
def divergence_weights(signals: Signals, constants: Objective) -> Tensor | None:
    """The weight of every token's divergence from the teacher, gate included -> [B, T], 0 outside the mask. None without one.

    `eopd` takes tokens of a teacher entropy above `eopd_threshold` nats only (2603.07079).
    """
    if not constants.is_distributional:
        return None
    weights = torch.ones_like(signals.teacher_entropy)
    if constants.name == "eopd":
        weights = (signals.teacher_entropy > constants.eopd_threshold).to(weights.dtype)
    if constants.gate_kind != "off":
        weights = weights * confidence(signals, constants)
    return weights.masked_fill(~signals.mask, 0)


def _sampled(signals: Signals, constants: Objective) -> Tensor:
    match constants.name:
        case "grpo":
            return sampled.grpo(signals)
        case "rlsd":
            return sampled.rlsd(signals, constants)
        case "egrsd" | "cl_egrsd":
            return sampled.gated(signals, constants)
        case "position":
            return sampled.position(signals, constants)
        case "opd" | "eopd":
            return sampled.opd(signals)
        case "reward_opd":
            return sampled.reward_opd(signals, constants)
        case "iw_opd":
            return sampled.iw_opd(signals, constants)
        case "sdar":
            return sampled.sdar(signals, constants)
        case "minillm":
            return sampled.minillm(signals, constants)
        case "fkl" | "gkd" | "opsd":
            return torch.zeros_like(signals.teacher_logprobs)
        case "sft":
            return sampled.sft(signals)
    raise ValueError(f"name: no objective '{constants.name}'")


def denominators(mask: Tensor, num_tokens: int, num_traces: int, constant: int, normalise: str) -> float | Tensor:
    """What every token's term is divided by: one number, or [N] in the order of the mask.

    token: num_tokens, the mean over all tokens (2605.13255, the paper). sequence: num_traces x T_i, the mean over traces of the
    means over their tokens (GRPO, 2402.03300). constant: num_traces x constant (Dr. GRPO, 2503.20783).
    mask [B, T] bool; the counts are those of the *global* minibatch.
    """
    if normalise == "token":
        return num_tokens
    if normalise == "constant":
        return num_traces * constant
    lengths = mask.sum(1, keepdim=True).expand(mask.shape)[mask]
    return lengths * float(num_traces)


def coefficients(weights: Tensor, denominators: float | Tensor) -> Tensor:
    """dL / dlog p = -A_t / num_tokens of every token (2605.13255, Eq. 7): weights of any shape -> the same shape, detached.

    denominators: the response tokens of the *global* minibatch, or another norm of `denominators`. With 1 it gives the numerator
    of Eq. 7 alone.
    """
    return -weights.detach() / denominators


def weighted_sum(logprobs: Tensor, coefficients: Tensor) -> Tensor:
    """sum_n c_n log p_n -> scalar nats: L of Eq. 7, or one micro-batch's part of it, where c comes from `coefficients`.

    logprobs [N] nats of the current policy, coefficients [N].
    """
    return (coefficients * logprobs).sum()


def loss(logprobs: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """-sum(m A_t log p) / sum(m), the token mean over all response tokens of a whole minibatch (2605.13255, Eq. 7) -> scalar.

    logprobs [B, T] nats of the current policy, weights [B, T] as of `token_weights`, mask [B, T] bool. No gradient flows into the
    weights. Raises ValueError on shapes that differ, and on a mask without a token, whose mean would be NaN.
    """
    check_mask(mask)
    check_like("weights", weights, mask)
    if logprobs.shape != mask.shape:
        raise ValueError(f"logprobs: shape {tuple(logprobs.shape)}, expected {tuple(mask.shape)} as the mask")
    if not mask.any():
        raise ValueError("mask: no token to train on")
    return weighted_sum(logprobs[mask], coefficients(weights[mask], int(mask.sum())))
