"""The factor of every token that can stand on any objective: gates on entropy, and the controls of a gate.

The gates are `entropy` (2605.13255, Eq. 6), `cl_entropy` (the same on Eq. 8) and `top_entropy` (2506.01939). Each control changes
one thing of a gate and keeps the rest. The gate carries no gradient.
"""

from __future__ import annotations

from math import ceil, inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.method.objective.signals import Signals, check_like, check_mask, needed

if TYPE_CHECKING:
    from pipeline.config import Objective, Weights


def shift_left(values: Tensor, step: int, fill: float) -> Tensor:
    """[B, T] -> [B, T] with out[:, t] = values[:, t + step], and `fill` where that lies beyond the end."""
    return torch.nn.functional.pad(values[:, step:], (0, min(step, values.shape[1])), value=fill)


def lookahead_min(entropy: Tensor, mask: Tensor, window: int) -> Tensor:
    """Least entropy among each token and the `window` tokens after it in its own trace (2605.13255, Eq. 8).

    entropy [B, T] nats, mask [B, T] bool -> [B, T] nats, inf outside the mask. window = 0 returns entropy.
    """
    check_mask(mask)
    check_like("entropy", entropy, mask)
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
    check_mask(mask)
    check_like("entropy", entropy, mask)
    return torch.cat([entropy[mask], entropy.new_tensor([constants.min_normaliser])]).max()


def gate(entropy: Tensor, normaliser: float | Tensor, constants: Weights) -> Tensor:
    """omega = clip(1 - gamma H / M, floor, 1) (2605.13255, Eq. 6): entropy [B, T] nats, finite, M in nats -> [B, T]."""
    return (1 - constants.gamma * (entropy / normaliser)).clamp(constants.floor, 1)


def threshold(values: Tensor, share: float) -> Tensor:
    """The least of the ceil(share N) largest of N values -> scalar: what `top_entropy` compares with (2506.01939).

    values [N] of the *global* minibatch, N > 0. Values that are equal to the threshold pass too.
    """
    count = min(len(values), max(1, ceil(share * len(values) - 1e-9)))  # .2 x 15 is 3.0000000000000004 in binary
    return values.topk(count).values[-1]


def shuffle(values: Tensor, mask: Tensor, seeds: Tensor) -> Tensor:
    """Each trace's own values in another order, for the control `shuffled`. The trace's seed and length alone decide the order.

    values [B, T], mask [B, T] bool, seeds [B] int64 -> [B, T]. Values outside the mask stay where they are.
    """
    check_mask(mask)
    mixed = values.clone()
    for row, seed in enumerate(seeds.tolist()):
        trace = values[row, mask[row]]
        order = torch.randperm(len(trace), generator=torch.Generator().manual_seed(seed))
        mixed[row, mask[row]] = trace[order.to(trace.device)]
    return mixed


def confidence(signals: Signals, constants: Objective) -> Tensor:
    """The gate of every token -> [B, T], or one of its controls (`constants.control`). Each control changes one thing.

    shuffled: the gate reads the same entropies, but on other tokens of the same trace. uniform: every token of the minibatch has
    the minibatch's mean gate. inverted: clip(1 - gamma (1 - H / M), floor, 1), which is open where the teacher is uncertain; of
    `top_entropy`, the tokens of lowest entropy. Raises ValueError when `seeds`, `mean_gate` or `threshold` is missing.
    """
    match constants.control:
        case "none" | "inverted":
            return _opened(_read(signals, constants), signals, constants)
        case "shuffled":
            seeds = needed("seeds", signals.seeds, "the shuffled gate")
            return _opened(shuffle(_read(signals, constants), signals.mask, seeds), signals, constants)
        case "uniform":
            if signals.mean_gate is None:
                raise ValueError("mean_gate: the uniform gate needs the global minibatch's")
            return torch.ones_like(signals.teacher_entropy) * signals.mean_gate
    raise ValueError(f"control: '{constants.control}', expected none, shuffled, uniform or inverted")


@torch.no_grad()
def gate_sum(signals: Signals, constants: Objective) -> Tensor:
    """Sum of the gate over the tokens of a micro-batch -> float64 scalar. The control `uniform` needs their mean."""
    return _opened(_read(signals, constants), signals, constants)[signals.mask].double().sum()


def readings(signals: Signals, constants: Objective) -> Tensor:
    """What the gate compares, of every response token -> [N]. `threshold` needs these of the global minibatch."""
    return _read(signals, constants)[signals.mask]


def _read(signals: Signals, constants: Objective) -> Tensor:
    """What the gate reads -> [B, T] nats, turned around for the control `inverted`."""
    inverted = constants.control == "inverted"
    match constants.gate_kind:
        case "entropy":
            entropy = signals.teacher_entropy
        case "cl_entropy":
            entropy = lookahead_min(signals.teacher_entropy, signals.mask, constants.window)
        case "top_entropy":
            entropy = needed("student_entropy", signals.student_entropy, "the gate top_entropy")
            return -entropy if inverted else entropy
        case _:
            raise ValueError(f"gate: '{constants.gate}', expected entropy, cl_entropy or top_entropy:SHARE")
    return signals.normaliser - entropy if inverted else entropy


def _opened(values: Tensor, signals: Signals, constants: Objective) -> Tensor:
    """The gate on what it reads: values [B, T] -> [B, T]."""
    if constants.gate_kind != "top_entropy":
        return gate(values, signals.normaliser, constants)
    if signals.threshold is None:
        raise ValueError("threshold: the gate top_entropy needs the global minibatch's")
    return (values >= signals.threshold).to(values.dtype)
