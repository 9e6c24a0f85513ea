"""EGRSD and CL-EGRSD on padded minibatches (2605.13255): magnitude, lookahead, gate, token weights, loss. Torch.

Shapes: `B` traces, `T` response tokens (padded), `N` response tokens without padding; masks are True on response tokens.
Entropies and log-probabilities are in nats over the full vocabulary at temperature 1. Token weights carry no gradient: it flows
through the policy's log-probs alone. The optimiser step (training/step.py) calls `coefficients`, its head `weighted_sum`, and
`loss` is made of the same two.

Constants arrive as the record that holds them, `config.Objective`, so a new constant changes no signature. README.md beside this
file lists the traps that are named by number.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.config import Objective, Weights


@dataclass(frozen=True, eq=False)
class Signals:
    """What was stored about a minibatch, or about one micro-batch of it.

    advantage [B]; teacher_logprobs, student_logprobs, teacher_entropy [B, T] nats; mask [B, T] bool. `normaliser` is M of Eq. 5
    in nats over the *global* minibatch: reduce the function `normaliser` with MAX over ranks and micro-batches (trap 2).
    `step` counts optimiser steps from 0. Two controls need more. `shuffled` needs `seeds` [B] int64, one per trace. `uniform`
    needs `mean_gate`, the mean gate of the *global* minibatch: the sum of `gate_sum` divided by the number of tokens.
    Raises ValueError that names the argument whose shape, type or value does not fit. The caller leaves out (mask False) a row
    without a finite signal, so that the row leaves the denominator of the loss too.
    """

    advantage: Tensor
    teacher_logprobs: Tensor
    student_logprobs: Tensor
    teacher_entropy: Tensor
    mask: Tensor
    normaliser: float | Tensor
    step: int = 0
    seeds: Tensor | None = None
    mean_gate: float | Tensor | None = None

    def __post_init__(self) -> None:
        _check_mask(self.mask)
        if self.advantage.shape != self.mask.shape[:1]:
            raise ValueError(f"advantage: shape {tuple(self.advantage.shape)}, expected [B] of mask {tuple(self.mask.shape)}")
        _check_finite("advantage", self.advantage, self.mask.any(1))
        for name in ("teacher_logprobs", "student_logprobs", "teacher_entropy"):
            _check_like(name, getattr(self, name), self.mask)
            _check_finite(name, getattr(self, name), self.mask)
        if not 0 < float(self.normaliser) < inf:
            raise ValueError(f"normaliser: {float(self.normaliser)}, expected a positive number of nats")
        if self.seeds is not None and (self.seeds.shape != self.mask.shape[:1] or self.seeds.dtype != torch.int64):
            raise ValueError(f"seeds: {self.seeds.dtype} {tuple(self.seeds.shape)}, expected int64 [B]")


def shift_left(values: Tensor, step: int, fill: float) -> Tensor:
    """[B, T] -> [B, T] with out[:, t] = values[:, t + step], and `fill` where that lies beyond the end."""
    return torch.nn.functional.pad(values[:, step:], (0, min(step, values.shape[1])), value=fill)


def lookahead_min(entropy: Tensor, mask: Tensor, window: int) -> Tensor:
    """Least entropy among each token and the `window` tokens after it in its own trace (2605.13255, Eq. 8).

    entropy [B, T] nats, mask [B, T] bool -> [B, T] nats, inf outside the mask. window = 0 returns entropy.
    """
    _check_mask(mask)
    _check_like("entropy", entropy, mask)
    if window < 0:
        raise ValueError(f"window: {window}, expected 0 or more tokens")
    lowest = padded = entropy.masked_fill(~mask, inf)
    for step in range(1, min(window, entropy.shape[1] - 1) + 1):
        lowest = torch.minimum(lowest, shift_left(padded, step, fill=inf))
    return lowest


def normaliser(entropy: Tensor, mask: Tensor, constants: Weights) -> Tensor:
    """M = max(largest entropy of the batch, min_normaliser) (2605.13255, Eq. 5).

    entropy [B, T] nats, as it is and not its lookahead minimum (trap 1), mask [B, T] bool -> scalar nats, of this batch alone.
    A MAX over ranks and micro-batches makes it global.
    """
    _check_mask(mask)
    _check_like("entropy", entropy, mask)
    return torch.cat([entropy[mask], entropy.new_tensor([constants.min_normaliser])]).max()


def magnitude(teacher_logprobs: Tensor, student_logprobs: Tensor, direction: Tensor, epsilon: float) -> Tensor:
    """w = clip(exp(D (log p_T - log p_S)), 1 - eps, 1 + eps) (2605.13255, Eq. 2).

    Log-probs [B, T] nats, direction D [B] in {-1, 0, 1} -> [B, T]. Raises ValueError on shapes that differ.
    """
    _check_like("student_logprobs", student_logprobs, teacher_logprobs)
    if direction.shape != teacher_logprobs.shape[:1]:
        raise ValueError(f"direction: shape {tuple(direction.shape)}, expected [B] of {tuple(teacher_logprobs.shape)}")
    delta = teacher_logprobs - student_logprobs
    return torch.exp(direction[:, None] * delta).clamp(1 - epsilon, 1 + epsilon)


def gate(entropy: Tensor, normaliser: float | Tensor, constants: Weights) -> Tensor:
    """omega = clip(1 - gamma H / M, floor, 1) (2605.13255, Eq. 6): entropy [B, T] nats, finite, M in nats -> [B, T]."""
    return (1 - constants.gamma * (entropy / normaliser)).clamp(constants.floor, 1)


def shuffle(values: Tensor, mask: Tensor, seeds: Tensor) -> Tensor:
    """Each trace's own values in another order, for the control `shuffled`. The trace's seed and length alone decide the order.

    values [B, T], mask [B, T] bool, seeds [B] int64 -> [B, T]. Values outside the mask stay where they are.
    """
    _check_mask(mask)
    mixed = values.clone()
    for row, seed in enumerate(seeds.tolist()):
        trace = values[row, mask[row]]
        order = torch.randperm(len(trace), generator=torch.Generator().manual_seed(seed))
        mixed[row, mask[row]] = trace[order.to(trace.device)]
    return mixed


def position_weight(mask: Tensor, least: float, tau: float, scale: float) -> Tensor:
    """least + (1 - least) sigmoid(((t - .5) / T - tau) / scale), t = 1 .. T within the trace (PW-OPSD, 2605.21606).

    mask [B, T] bool -> [B, T] float32 in [least, 1]: later tokens weigh more, whatever their entropy.
    """
    _check_mask(mask)
    place = (mask.cumsum(1) - 0.5) / mask.sum(1, keepdim=True).clamp(min=1)
    return least + (1 - least) * torch.sigmoid((place - tau) / scale)


def grpo(signals: Signals) -> Tensor:
    """A, the same for every token of a trace -> [B, T]."""
    return signals.advantage[:, None].expand(signals.mask.shape)


def rlsd(signals: Signals, constants: Objective) -> Tensor:
    """A ((1 - lam) + lam w) (RLSD, 2604.03128) -> [B, T]; lam falls linearly to 0 over `rlsd_decay_steps` (0: it stays)."""
    decay = constants.rlsd_decay_steps
    lam = constants.rlsd_lam * (max(0.0, 1 - signals.step / decay) if decay else 1.0)
    return grpo(signals) * ((1 - lam) + lam * _magnitude(signals, constants))


def gated(signals: Signals, constants: Objective) -> Tensor:
    """A w omega (2605.13255, Eq. 7) -> [B, T]: the objectives `egrsd` and `cl_egrsd`, which differ in what the gate reads."""
    return grpo(signals) * _magnitude(signals, constants) * confidence(signals, constants)


def confidence(signals: Signals, constants: Objective) -> Tensor:
    """The gate of `egrsd` or `cl_egrsd` -> [B, T], or one of its controls (`constants.gate`). Each control changes one thing.

    shuffled: the gate reads the same entropies, but on other tokens of the same trace. uniform: every token of the minibatch has
    the minibatch's mean gate. inverted: clip(1 - gamma (1 - H / M), floor, 1), which is open where the teacher is uncertain.
    Raises ValueError when `seeds` or `mean_gate` is missing, or the gate has another name.
    """
    entropy = _gated_entropy(signals, constants)
    match constants.gate:
        case "entropy":
            pass
        case "shuffled":
            if signals.seeds is None:
                raise ValueError("seeds: the shuffled gate needs one per trace")
            entropy = shuffle(entropy, signals.mask, signals.seeds)
        case "uniform":
            if signals.mean_gate is None:
                raise ValueError("mean_gate: the uniform gate needs the global minibatch's")
            return torch.ones_like(entropy) * signals.mean_gate
        case "inverted":
            entropy = signals.normaliser - entropy
        case _:
            raise ValueError(f"gate: '{constants.gate}', expected entropy, shuffled, uniform or inverted")
    return gate(entropy, signals.normaliser, constants)


@torch.no_grad()
def gate_sum(signals: Signals, constants: Objective) -> Tensor:
    """Sum of the gate of Eq. 6 over the tokens of a micro-batch -> float64 scalar. The control `uniform` needs their mean."""
    return gate(_gated_entropy(signals, constants), signals.normaliser, constants)[signals.mask].double().sum()


def position(signals: Signals, constants: Objective) -> Tensor:
    """A w times `position_weight`, the rival explanation of the gain (PW-OPSD, 2605.21606) -> [B, T]."""
    place = position_weight(signals.mask, constants.position_min, constants.position_tau, constants.position_scale)
    return grpo(signals) * _magnitude(signals, constants) * place


@torch.no_grad()
def token_weights(signals: Signals, constants: Objective) -> Tensor:
    """Token advantages A_t of the objective `constants.name` (Eq. 7) -> [B, T], detached, finite, 0 outside the mask."""
    match constants.name:
        case "grpo":
            weights = grpo(signals)
        case "rlsd":
            weights = rlsd(signals, constants)
        case "egrsd" | "cl_egrsd":
            weights = gated(signals, constants)
        case "position":
            weights = position(signals, constants)
        case _:
            raise ValueError(f"name: no objective '{constants.name}', expected grpo, rlsd, egrsd, cl_egrsd or position")
    return weights.masked_fill(~signals.mask, 0)


# ---- Eq. 7: the loss that is tested is the loss that trains ------------------------------------------------------------


def coefficients(weights: Tensor, num_tokens: float) -> Tensor:
    """dL / dlog p = -A_t / num_tokens of every token (2605.13255, Eq. 7): weights of any shape -> the same shape, detached.

    num_tokens counts the response tokens of the *global* minibatch. With 1 it gives the numerator of Eq. 7 alone.
    """
    return -weights.detach() / num_tokens


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
    _check_mask(mask)
    _check_like("weights", weights, mask)
    if logprobs.shape != mask.shape:
        raise ValueError(f"logprobs: shape {tuple(logprobs.shape)}, expected {tuple(mask.shape)} as the mask")
    if not mask.any():
        raise ValueError("mask: no token to train on")
    return weighted_sum(logprobs[mask], coefficients(weights[mask], int(mask.sum())))


def _magnitude(signals: Signals, constants: Weights) -> Tensor:
    return magnitude(signals.teacher_logprobs, signals.student_logprobs, signals.advantage.sign(), constants.epsilon)


def _gated_entropy(signals: Signals, constants: Objective) -> Tensor:
    """What the gate reads -> [B, T] nats: H in `egrsd`, H^CL in `cl_egrsd`."""
    if constants.name == "egrsd":
        return signals.teacher_entropy
    return lookahead_min(signals.teacher_entropy, signals.mask, constants.window)


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"mask: {mask.dtype} with {mask.ndim} axes, expected bool [B, T]")


def _check_like(name: str, values: Tensor, like: Tensor) -> None:
    if values.shape != like.shape:  # equal, not merely broadcastable
        raise ValueError(f"{name}: shape {tuple(values.shape)}, expected {tuple(like.shape)}")
    if values.dtype not in (torch.float32, torch.float64):  # half precision loses the 0.002 nat that matters
        raise ValueError(f"{name}: {values.dtype}, expected float32 or float64")


def _check_finite(name: str, values: Tensor, mask: Tensor) -> None:
    if not torch.isfinite(values[mask]).all():
        raise ValueError(f"{name}: a token inside the mask is NaN or infinite")
