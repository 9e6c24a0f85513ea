"""EGRSD and CL-EGRSD on padded minibatches (2605.13255): magnitude, lookahead, gate, token weights, loss.

Shapes: `B` traces, `T` response tokens (padded); masks are True on response tokens. Entropies and log-probabilities are in
nats over the full vocabulary at temperature 1. Token weights carry no gradient: it flows through the policy's log-probs alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Protocol

import torch
from torch import Tensor


class Constants(Protocol):
    """The constants of a token weight; `config.Objective` has this form."""

    @property
    def gate(self) -> str:
        """What the gate makes of the entropies: `entropy` (Eq. 6), or the control `shuffled`, `uniform` or `inverted`."""

    @property
    def gamma(self) -> float:
        """How far the gate closes where entropy is largest (Eq. 6)."""

    @property
    def floor(self) -> float:
        """The least the gate leaves (Eq. 6)."""

    @property
    def epsilon(self) -> float:
        """Half-width of the clip on magnitudes, around 1."""

    @property
    def window(self) -> int:
        """Tokens that the lookahead looks ahead."""

    @property
    def rlsd_lam(self) -> float:
        """Share of the token weight in RLSD at step 0 (2604.03128)."""

    @property
    def rlsd_decay_steps(self) -> int:
        """Optimiser steps until that share is 0; 0 lets it stay."""

    @property
    def position_min(self) -> float:
        """The least position weight (2605.21606)."""

    @property
    def position_tau(self) -> float:
        """Where in a trace, as a share of its length, the position weight is half way."""

    @property
    def position_scale(self) -> float:
        """How gradually it changes there, in the same unit."""


@dataclass(frozen=True, eq=False)
class Signals:
    """What was stored about a minibatch, or about one micro-batch of it.

    advantage [B]; teacher_logprobs, student_logprobs, teacher_entropy [B, T] nats; mask [B, T] bool. `peak` is M of Eq. 5, the
    maximum over the *global* minibatch: reduce `entropy_peak` with MAX over ranks and micro-batches first. `step` counts
    optimiser steps from 0. Two controls need more: `seeds` [B] int64 (a trace's own, for `shuffled`) and `mean_gate`, the mean of
    Eq. 6's gate over the *global* minibatch (for `uniform`: add up `gate_sum`, divide by all tokens). Raises ValueError that
    names the argument whose shape, type or value does not fit; a row without a finite signal has to be left out (mask False) by
    the caller, so that it leaves the loss's denominator too.
    """

    advantage: Tensor
    teacher_logprobs: Tensor
    student_logprobs: Tensor
    teacher_entropy: Tensor
    mask: Tensor
    peak: float | Tensor
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
        if not 0 < float(self.peak) < inf:
            raise ValueError(f"peak: {float(self.peak)}, expected a positive number of nats")
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


def entropy_peak(entropy: Tensor, mask: Tensor, least: float = 1.0) -> Tensor:
    """M = max(largest entropy of the batch, `least`) (2605.13255, Eq. 5): of the raw entropies, not of their lookahead minima.

    entropy [B, T] nats, mask [B, T] bool -> scalar, of this batch alone (a MAX over ranks and micro-batches makes it global).
    """
    _check_mask(mask)
    _check_like("entropy", entropy, mask)
    return torch.cat([entropy[mask], entropy.new_tensor([least])]).max()


def magnitude(teacher_logprobs: Tensor, student_logprobs: Tensor, direction: Tensor, epsilon: float) -> Tensor:
    """w = clip(exp(D (log p_T - log p_S)), 1 - eps, 1 + eps) (2605.13255, Eq. 2).

    Log-probs [B, T] nats, direction D [B] in {-1, 0, 1} -> [B, T]. Raises ValueError on shapes that differ.
    """
    _check_like("student_logprobs", student_logprobs, teacher_logprobs)
    if direction.shape != teacher_logprobs.shape[:1]:
        raise ValueError(f"direction: shape {tuple(direction.shape)}, expected [B] of {tuple(teacher_logprobs.shape)}")
    delta = teacher_logprobs - student_logprobs
    return torch.exp(direction[:, None] * delta).clamp(1 - epsilon, 1 + epsilon)


def gate(entropy: Tensor, peak: float | Tensor, gamma: float, floor: float) -> Tensor:
    """omega = clip(1 - gamma H / M, floor, 1) (2605.13255, Eq. 6); entropy [B, T] nats, finite -> [B, T] in [floor, 1]."""
    return (1 - gamma * (entropy / peak)).clamp(floor, 1)


def shuffle(values: Tensor, mask: Tensor, seeds: Tensor) -> Tensor:
    """Every trace's values in another order, which its seed and its length alone decide: the control of what a gate knows.

    values [B, T], mask [B, T] bool, seeds [B] int64 -> [B, T]; outside the mask as it was. The values of a trace stay its own.
    """
    _check_mask(mask)
    mixed = values.clone()
    for row, seed in enumerate(seeds.tolist()):
        own = values[row, mask[row]]
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
        mixed[row, mask[row]] = own[order.to(own.device)]
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


def rlsd(signals: Signals, constants: Constants) -> Tensor:
    """A ((1 - lam) + lam w) (RLSD, 2604.03128) -> [B, T]; lam falls linearly to 0 over `rlsd_decay_steps` (0: it stays)."""
    decay = constants.rlsd_decay_steps
    lam = constants.rlsd_lam * (max(0.0, 1 - signals.step / decay) if decay else 1.0)
    return grpo(signals) * ((1 - lam) + lam * _magnitude(signals, constants))


def egrsd(signals: Signals, constants: Constants) -> Tensor:
    """A w omega(H) (2605.13255, Eq. 7) -> [B, T]."""
    return grpo(signals) * _magnitude(signals, constants) * confidence("egrsd", signals, constants)


def cl_egrsd(signals: Signals, constants: Constants) -> Tensor:
    """A w omega(H^CL), the gate on the lookahead minimum (2605.13255, Eq. 8) -> [B, T]; window = 0 is `egrsd`."""
    return grpo(signals) * _magnitude(signals, constants) * confidence("cl_egrsd", signals, constants)


def confidence(name: str, signals: Signals, constants: Constants) -> Tensor:
    """The gate of `egrsd` or `cl_egrsd` -> [B, T], or of one of its controls (`constants.gate`), which keep all but one thing:

    shuffled: the same entropies, on other tokens of the trace; uniform: the same mean, the same on every token of the minibatch;
    inverted: clip(1 - gamma (1 - H / M), floor, 1), confident where the teacher is not.
    """
    entropy = _gated_entropy(name, signals, constants)
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
            entropy = signals.peak - entropy
        case _:
            raise ValueError(f"gate: '{constants.gate}', expected entropy, shuffled, uniform or inverted")
    return gate(entropy, signals.peak, constants.gamma, constants.floor)


@torch.no_grad()
def gate_sum(name: str, signals: Signals, constants: Constants) -> Tensor:
    """Sum of the gate of Eq. 6 over the tokens of a micro-batch -> float64 scalar; what the control `uniform` is the mean of."""
    entropy = _gated_entropy(name, signals, constants)
    return gate(entropy, signals.peak, constants.gamma, constants.floor)[signals.mask].double().sum()


def position(signals: Signals, constants: Constants) -> Tensor:
    """A w times `position_weight`, the rival explanation of the gain (PW-OPSD, 2605.21606) -> [B, T]."""
    place = position_weight(signals.mask, constants.position_min, constants.position_tau, constants.position_scale)
    return grpo(signals) * _magnitude(signals, constants) * place


@torch.no_grad()
def token_weights(name: str, signals: Signals, constants: Constants) -> Tensor:
    """Token advantages of the objective `name` (Eq. 7): [B, T], detached, finite, 0 outside the mask."""
    match name:
        case "grpo":
            weights = grpo(signals)
        case "rlsd":
            weights = rlsd(signals, constants)
        case "egrsd":
            weights = egrsd(signals, constants)
        case "cl_egrsd":
            weights = cl_egrsd(signals, constants)
        case "position":
            weights = position(signals, constants)
        case _:
            raise ValueError(f"name: no objective '{name}', expected grpo, rlsd, egrsd, cl_egrsd or position")
    return weights.masked_fill(~signals.mask, 0)  # fill, not multiply: padding may hold inf or NaN


def loss_sum(logprobs: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """-sum(m A_t log p) (numerator of 2605.13255, Eq. 7): what a rank adds up before it divides by the global token count.

    logprobs [B, T] nats of the current policy, weights [B, T] (no gradient flows into them), mask [B, T] -> scalar.
    """
    _check_mask(mask)
    _check_like("weights", weights, mask)
    if logprobs.shape != mask.shape:
        raise ValueError(f"logprobs: shape {tuple(logprobs.shape)}, expected {tuple(mask.shape)} as the mask")
    terms = weights.detach() * logprobs.masked_fill(~mask, 0)
    return -terms.masked_fill(~mask, 0).sum()


def loss(logprobs: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """-sum(m A_t log p) / sum(m), the token mean over all completion tokens of the batch (2605.13255, Eq. 7) -> scalar.

    Raises ValueError when the mask has no token at all: a mean of nothing would be NaN.
    """
    total = loss_sum(logprobs, weights, mask)
    if not mask.any():
        raise ValueError("mask: no token to train on")
    return total / mask.sum()


def _magnitude(signals: Signals, constants: Constants) -> Tensor:
    return magnitude(signals.teacher_logprobs, signals.student_logprobs, signals.advantage.sign(), constants.epsilon)


def _gated_entropy(name: str, signals: Signals, constants: Constants) -> Tensor:
    """What the gate of `egrsd` (H) or `cl_egrsd` (H^CL) reads."""
    if name == "egrsd":
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
