"""Minibatches of signals: the golden one, random ones with padding full of NaN, and their parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from golden import arithmetic
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config import Objective
from pipeline.config.objective import OBJECTIVES
from pipeline.method import objective

GOLDEN = arithmetic.GOLDEN
NAMES = OBJECTIVES
COLUMNS = ("teacher_logprobs", "student_logprobs", "teacher_entropy", "rollout_logprobs", "student_entropy", "mask")


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def padded(rows: list[list[float]], fill: float = float("nan")) -> Tensor:
    """Rows of unequal length as [B, T]; NaN in the padding shows up wherever it leaks."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.float64)


def golden_signals() -> objective.Signals:
    columns = {name: padded(GOLDEN[name]) for name in ("teacher_logprobs", "student_logprobs")}
    entropy = padded(GOLDEN["entropy"])
    mask = ~entropy.isnan()
    normaliser = objective.normaliser(entropy, mask, Objective())
    advantage = torch.tensor(GOLDEN["advantage"], dtype=torch.float64)
    seeds = torch.tensor([1, 2])
    return objective.Signals(advantage, **columns, teacher_entropy=entropy, mask=mask, normaliser=normaliser, seeds=seeds)


@dataclass
class Batch:
    """A random minibatch with its padding full of NaN."""

    signals: objective.Signals
    logprobs: Tensor


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = len(lengths), max(lengths)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]

    def column(scale: float) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * scale).masked_fill(~mask, float("nan"))

    entropy = column(draw(st.sampled_from([0.01, 1.0, 8.0])))
    advantage = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    normaliser = objective.normaliser(entropy, mask, Objective())
    seeds = torch.randint(0, 2**31, shape[:1], generator=generator)
    signals = objective.Signals(advantage, -column(3), -column(3), entropy, mask, normaliser, step=7, seeds=seeds)
    return Batch(replace(signals, rollout_logprobs=-column(3), student_entropy=column(2)), -column(5))


GATES = ("own", "off", "entropy", "cl_entropy", "top_entropy:0.3")
CONTROLS = ("none", "shuffled", "uniform", "inverted")
KINDS = [(name, gate, "none") for name in NAMES for gate in GATES]
KINDS += [(name, gate, control) for name in NAMES for gate in GATES[2:] for control in CONTROLS[1:]]
objectives = st.builds(
    lambda kind, **constants: Objective(name=kind[0], gate=kind[1], control=kind[2], **constants),
    st.sampled_from(KINDS),
    gamma=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    window=st.integers(0, 12),
    epsilon=st.sampled_from([0.05, 0.2, 0.9]),
)


def weights_of(signals: objective.Signals, constants: Objective) -> Tensor:
    return objective.token_weights(whole(signals, constants), constants)


def whole(signals: objective.Signals, constants: Objective) -> objective.Signals:
    """The signals with the figures of the minibatch that their gate needs."""
    if constants.gate_kind == "top_entropy" and signals.threshold is None:
        read = objective.readings(signals, constants)
        signals = replace(signals, threshold=objective.threshold(read, constants.gate_share))
    if constants.control == "uniform" and signals.mean_gate is None:
        signals = replace(signals, mean_gate=objective.gate_sum(signals, constants) / signals.mask.sum())
    return signals


def select(signals: objective.Signals, index: Tensor | slice) -> objective.Signals:
    names = [name for name in ("advantage", "seeds", *COLUMNS) if getattr(signals, name) is not None]
    return replace(signals, **{name: getattr(signals, name)[index] for name in names})


def pad(values: Tensor, left: int, right: int) -> Tensor:
    return torch.nn.functional.pad(values, (left, right), value=False if values.dtype == torch.bool else float("nan"))


def gates(signals: objective.Signals, **constants: object) -> Tensor:
    constants = Objective(**constants)
    return objective.confidence(whole(signals, constants), constants)
