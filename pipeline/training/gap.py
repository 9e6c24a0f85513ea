"""Do trainer and engine compute the same model? Their log-probs of the same tokens are compared, and a large gap ends the run.

The engine stored the log-probs of the policy that answered. The first step of a round finds the trainer with the weights of that
policy. With `max_staleness` the trainer is ahead: it then puts the weights of that policy in place for one forward pass.

Policy 0 changes nothing, so it tells only of the base model. Faults of the adapter show from policy 1 on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.config import Run
from pipeline.errors import TrainingError

# Nats of the mean and of the largest gap. tests/benchmarks/RESULTS.md has the measurements: the tolerances are above every family
# that agrees, and far below every fault that was found.
TOLERANCES = {"float32": (1e-4, 1e-2), "bfloat16": (0.05, 2.5), "float16": (0.05, 2.5)}
_BASE = (
    "Likely: model.max_model_len reaches past the window for which positions were scaled. "
    "Or one side does not load a weight, or a node has another copy of the model"
)
_ADAPTER = (
    "Likely: the engine does not apply the adapter to a layer as peft does, since policy 0 agreed. "
    "Take that layer out of model.lora_targets"
)
_ANYWAY = "train.logprob_gap and train.logprob_gap_max set what is accepted"


class Tolerance(NamedTuple):
    """The mean and the largest gap that a step may have, in nats."""

    mean: float
    largest: float


def tolerance(run: Run) -> Tolerance:
    """What a run accepts: its settings, or else what was measured for the coarser dtype of engine and trainer."""
    halves = {run.model.dtype, run.train.dtype} - {"float32"}
    mean, largest = TOLERANCES[min(halves, default="float32")]
    asked = run.train.logprob_gap, run.train.logprob_gap_max
    return Tolerance(mean if asked[0] is None else asked[0], largest if asked[1] is None else asked[1])


def check(run: Run, policy: int, mean: float, largest: float, where: str, trace: str = "") -> None:
    """Raise TrainingError, with likely causes, when the gap to the engine is above the tolerance of the run. NaN is above it.

    policy: version of the policy whose log-probs were compared. mean and largest in nats. trace: where the largest is, if known.
    """
    accepted = tolerance(run)
    if mean <= accepted.mean and largest <= accepted.largest:
        return
    at = f", in trace {trace}" if trace else ""
    what = (
        f"trainer and engine disagree about policy {policy}: their log-probs differ by {mean:.2g} nat on average "
        f"(accepted: {accepted.mean:g}) and by {largest:.2g} at most (accepted: {accepted.largest:g}){at}"
    )
    raise TrainingError(what, where, f"{_ADAPTER if policy else _BASE}. {_ANYWAY}")


@contextlib.contextmanager
def as_answered(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], adapter: Mapping[str, Tensor] | None
) -> Iterator[None]:
    """A block without gradients and dropout, with the weights of `adapter` in place, or the present ones for None.

    Names of parameters have peft's `.default`, and those of a saved adapter do not. A weight that `adapter` lacks is 0: an empty
    one is policy 0. Every rank must enter the block, since rank 0 deals sharded tensors.
    """
    kept: list[tuple[Any, Tensor]] = []
    for name, parameter in parameters.items() if adapter is not None else ():
        kept.append((parameter, parameter.data.clone()))
        value = (adapter or {}).get(name.replace(".default.", "."))
        parameter.data.copy_(_dealt(value if value is not None else torch.zeros(parameter.shape), parameter))
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)
        for parameter, own in kept:
            parameter.data.copy_(own)


def _dealt(value: Tensor, like: nn.Parameter) -> Tensor:
    """`value` on the device of `like`, and in the same shards."""
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.data.device_mesh, like.data.placements) if isinstance(like.data, DTensor) else value
