"""What was stored about a minibatch, checked, as every objective reads it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Signals:
    """What was stored about a minibatch, or about one micro-batch of it.

    advantage [B]; teacher_logprobs, student_logprobs, teacher_entropy [B, T] nats; mask [B, T] bool. `normaliser` is M of Eq. 5
    in nats over the *global* minibatch: reduce the function `normaliser` with MAX over ranks and micro-batches (trap 2).
    `step` counts optimiser steps from 0. The other columns [B, T] are there for the objectives that read them: rollout_logprobs,
    of the writer, and student_entropy.

    Some gates need more. The control `shuffled` needs `seeds` [B] int64, one per trace. `uniform` needs `mean_gate`, the mean
    gate of the *global* minibatch: the sum of `gate_sum` divided by the number of tokens. `top_entropy` needs the `threshold` of
    the global minibatch.
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
    rollout_logprobs: Tensor | None = None
    student_entropy: Tensor | None = None
    threshold: float | Tensor | None = None

    def __post_init__(self) -> None:
        check_mask(self.mask)
        if self.advantage.shape != self.mask.shape[:1]:
            raise ValueError(f"advantage: shape {tuple(self.advantage.shape)}, expected [B] of mask {tuple(self.mask.shape)}")
        _check_finite("advantage", self.advantage, self.mask.any(1))
        for name in ("teacher_logprobs", "student_logprobs", "teacher_entropy", "rollout_logprobs", "student_entropy"):
            if (values := getattr(self, name)) is not None:
                check_like(name, values, self.mask)
                _check_finite(name, values, self.mask)
        if not 0 < float(self.normaliser) < inf:
            raise ValueError(f"normaliser: {float(self.normaliser)}, expected a positive number of nats")
        if self.seeds is not None and (self.seeds.shape != self.mask.shape[:1] or self.seeds.dtype != torch.int64):
            raise ValueError(f"seeds: {self.seeds.dtype} {tuple(self.seeds.shape)}, expected int64 [B]")


def needed(name: str, values: Tensor | None, who: str) -> Tensor:
    """A column that only some objectives read. Raises ValueError, with its name, when it is not there."""
    if values is None:
        raise ValueError(f"{name}: {who} needs it")
    return values


def check_mask(mask: Tensor) -> None:
    """Raise ValueError unless the mask is bool [B, T]."""
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"mask: {mask.dtype} with {mask.ndim} axes, expected bool [B, T]")


def check_like(name: str, values: Tensor, like: Tensor) -> None:
    """Raise ValueError unless the values are float32 or float64 and have exactly the shape of `like`."""
    if values.shape != like.shape:  # equal, not merely broadcastable
        raise ValueError(f"{name}: shape {tuple(values.shape)}, expected {tuple(like.shape)}")
    if values.dtype not in (torch.float32, torch.float64):  # half precision loses the 0.002 nat that matters
        raise ValueError(f"{name}: {values.dtype}, expected float32 or float64")


def _check_finite(name: str, values: Tensor, mask: Tensor) -> None:
    if not torch.isfinite(values[mask]).all():
        raise ValueError(f"{name}: a token inside the mask is NaN or infinite")
