"""Whether a cluster can ever hold what a run asks for. A run then says what is missing, and does not wait for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Placement, Pool, Run
from pipeline.config.machines import Client
from pipeline.config.teachers import RESERVED
from pipeline.errors import ResourceError
from pipeline.fit.machine import vllm_for_gpus


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as Ray counts it: its total resources and its labels."""

    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Demand:
    """`count` actors with the same placement. Errors name the dotted `setting` that asks for them."""

    setting: str
    count: int
    placement: Placement

    @property
    def resources(self) -> dict[str, float]:
        """The amount of each resource that one actor takes, by Ray's names, without zeros."""
        asked = {"CPU": self.placement.cpus, "GPU": self.placement.gpus, **self.placement.resources}
        return {name: amount for name, amount in asked.items() if amount > 0}


def setting_of(pool: str) -> str:
    """The dotted name of the settings of a pool, which is named `rollout`, `score` or like its teacher."""
    return f"engines.{pool}" if pool in RESERVED else f"teachers.{pool}.engines"


def placement_of(pool: Pool) -> Placement:
    """The placement of one engine of a pool.

    vLLM's GPU build needs a card. Where the settings name none, as the recipe `demo` does, its engines ask Ray for one.
    """
    wants = pool.placement.gpus == 0 and vllm_for_gpus() and not isinstance(pool, Client)
    return pool.placement.model_copy(update={"gpus": float(pool.tensor_parallel)}) if wants else pool.placement


def options(placement: Placement) -> dict[str, Any]:
    """Ray's options for an actor or a task with a placement."""
    asked = {"num_cpus": placement.cpus, "num_gpus": placement.gpus, "resources": placement.resources}
    return {**asked, "label_selector": placement.labels} if placement.labels else asked


def pools_of(run: Run) -> list[tuple[str, Pool]]:
    """The pools of engines that a run needs, by name. With imported traces only an evaluation needs one that writes."""
    writes = run.engines.score is None or not run.only_imports or run.evaluation.problems > 0
    return [(name, pool) for name, pool in run.pools.items() if writes or name != "rollout"]


def demands_of(run: Run, engines: bool = True, train: bool = True) -> list[Demand]:
    """What a run asks of the cluster at one time: the smallest pools, the training ranks, and one data task."""
    pools = pools_of(run) if engines else []
    asked = [Demand(setting_of(name), max(1, pool.min), placement_of(pool)) for name, pool in pools]
    if train:
        asked.append(Demand("train", run.train.workers, run.train.placement))
    return [*asked, Demand("data stages", 1, Placement(cpus=1))]


def check(demands: list[Demand], nodes: list[Node]) -> None:
    """Raise ResourceError when `nodes` can never hold all `demands` at once; the error says how much of what is missing.

    Two conditions are checked. Each actor must fit on some node with its labels, and no resource's sum may exceed the
    cluster's. Both are necessary and not sufficient: demands that pass may still not fit together.
    """
    for demand in demands:
        _one_fits(demand, nodes)
    for name in {name for demand in demands for name in demand.resources}:
        asked = sum(demand.count * demand.resources.get(name, 0) for demand in demands)
        total = sum(node.resources.get(name, 0) for node in nodes)
        if asked > total + 1e-6:
            parts = " + ".join(f"{d.count} x {d.resources[name]:g} ({d.setting})" for d in demands if name in d.resources)
            raise ResourceError(
                f"{asked:g} {name} are asked for ({parts}), the cluster has {total:g}: {asked - total:g} are missing",
                ", ".join(d.setting for d in demands if name in d.resources),
                "Add nodes, or lower the numbers of engines and workers or their placement" + _shares(demands, name),
            )


def _shares(demands: list[Demand], name: str) -> str:
    """The settings with which small actors share CPUs, as they can be pasted. Empty for another resource."""
    whole = [d.setting for d in demands if name == "CPU" and d.resources.get(name) == 1 and d.setting != "data stages"]
    return f": --set {' --set '.join(f'{setting}.placement.cpus=0.5' for setting in whole)}" if whole else ""


def _one_fits(demand: Demand, nodes: Iterable[Node]) -> None:
    """Raise ResourceError unless one actor of `demand` fits on some node that has its labels."""
    if demand.count == 0:
        return
    labels, need = demand.placement.labels, demand.resources
    matching = [node for node in nodes if all(node.labels.get(key) == value for key, value in labels.items())]
    if not matching:
        wanted = ", ".join(f"{key}={value}" for key, value in labels.items())
        raise ResourceError(
            f"no node has the label {wanted}", f"{demand.setting}.placement.labels", "Start nodes with `ray start --labels`"
        )
    if any(all(node.resources.get(name, 0) >= amount for name, amount in need.items()) for node in matching):
        return
    best = {name: max(node.resources.get(name, 0) for node in matching) for name in need}
    asked, largest = (", ".join(f"{amount:g} {name}" for name, amount in side.items()) for side in (need, best))
    raise ResourceError(
        f"one asks for {asked}; the largest node has {largest}", f"{demand.setting}.placement", "Lower it, or add larger nodes"
    )
