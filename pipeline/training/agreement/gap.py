"""Do trainer and engine compute the same model? Their log-probs of the same tokens are compared, and a large gap ends the run.

The engine stored the log-probs of the policy that answered. The first step of a round finds the trainer with the weights of that
policy. With `max_staleness` the trainer is ahead: it then puts the weights of that policy in place for one forward pass.

Policy 0 changes nothing, so it tells only of the base model. Faults of the adapter show from policy 1 on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.config import Run
from pipeline.errors import TrainingError
from pipeline.training.batches import MicroBatch
from pipeline.training.student import student

_BASE = (
    "Likely: model.max_model_len reaches past the window for which positions were scaled. "
    "Or one side does not load a weight, or a node has another copy of the model"
)
_ADAPTER = "Likely: the engine does not apply the adapter to a layer as peft does. Take that layer out of model.lora_targets"
_WHOLE = "Likely: the engine does not load all weights of a policy as the trainer has them. Set model.tuning=lora"
_ANYWAY = "train.logprob_gap and train.logprob_gap_max set what is accepted"


class Worst(NamedTuple):
    """The largest gap between trainer and engine on this rank, a scalar in nats, and the trace that has it."""

    gap: Tensor
    trace: str


def check(run: Run, policy: int, mean: float, largest: float, where: str, trace: str = "") -> None:
    """Raise TrainingError, with likely causes, when the gap to the engine is above the tolerance of the run. NaN is above it.

    policy: version of the policy whose log-probs were compared. mean and largest in nats. trace: where the largest is, if known.
    """
    most_mean, most = run.accepted_gap
    if mean <= most_mean and largest <= most:
        return
    at = f", in trace {trace}" if trace else ""
    what = (
        f"trainer and engine disagree about policy {policy}: their log-probs differ by {mean:.2g} nat on average "
        f"(accepted: {most_mean:g}) and by {largest:.2g} at most (accepted: {most:g}){at}"
    )
    likely = _BASE if not policy else _WHOLE if run.model.tuning == "full" else _ADAPTER
    raise TrainingError(what, where, f"{likely}. {_ANYWAY}")


@contextlib.contextmanager
def as_answered(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor] | None
) -> Iterator[None]:
    """A block without gradients and dropout, with `weights` in place of the parameters, or the present ones for None.

    Names of parameters have peft's `.default`, and those of a saved adapter do not. A parameter that `weights` lack is 0: an
    empty adapter is policy 0. Every rank must enter the block, since rank 0 deals sharded tensors. The present weights wait in
    the memory of the machine, not of the device: whole models have no room for two there.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for name, parameter in parameters.items() if weights is not None else ():
                own = _local(parameter.data)
                kept.append((own, own.to("cpu", copy=True)))
                value = (weights or {}).get(name.replace(".default.", "."))
                parameter.data.copy_(_dealt(value if value is not None else torch.zeros(parameter.shape), parameter))
            yield
    finally:
        module.train(training)
        student.rest(module)
        for own, before in kept:
            own.copy_(before)


def gaps(micro: MicroBatch, logprobs: Tensor) -> tuple[Tensor, Worst]:
    """|trainer's - engine's log-prob| of every response token, [N] nats, and the largest with its trace."""
    gaps = (logprobs - micro.student_logprobs[micro.mask]).abs()
    if not len(gaps):
        return gaps, Worst(logprobs.new_zeros(()), "")
    largest, place = gaps.max(dim=0)
    return gaps, Worst(largest, micro.trace_ids[int(micro.mask.nonzero()[place, 0])])


def _local(value: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, not a copy of it."""
    return value.to_local() if isinstance(value, DTensor) else value


def _dealt(value: Tensor, like: nn.Parameter) -> Tensor:
    """`value` on the device of `like`, and in the same shards."""
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.data.device_mesh, like.data.placements) if isinstance(like.data, DTensor) else value
