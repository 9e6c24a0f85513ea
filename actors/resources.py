"""Whether a cluster can ever hold what a run asks for. A run then says what is missing, and does not wait for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Placement, Pool, Run
from pipeline.config.machines import Client
from pipeline.config.teachers import RESERVED
from pipeline.errors import ResourceError, SettingError
from pipeline.fit.machine import vllm_for_gpus

ASKING = ("rollout", "score", "evaluation")  # parts of a run that ask engines
_MOST_TRIES = 1000  # to find places, beside one for each actor


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


def pools_of(run: Run, asking: Collection[str] = ASKING) -> list[tuple[str, Pool]]:
    """The pools of engines that answer a part of a run, by name. `asking`: those of ASKING that the part has.

    Imported traces need no engine that writes. Teachers of their own answer where traces are scored, or where they write some.
    """
    scores, rolls = "score" in asking, "rollout" in asking
    writes = (rolls and not run.only_imports) or ("evaluation" in asking and run.evaluation.problems > 0)
    needed = {"rollout": writes or (scores and run.engines.score is None), "score": scores}
    taught = scores or (rolls and "teacher" in run.writers)
    return [(name, pool) for name, pool in run.pools.items() if needed.get(name, taught)]


def demands_of(run: Run, asking: Collection[str] = ASKING, train: bool = True) -> list[Demand]:
    """What a part of a run asks of the cluster at one time: the smallest pools, the training ranks, and one data task.

    Raises SettingError for cards that would hold too much, or of which some would stay idle.
    """
    pools = pools_of(run, asking)
    for name, pool in pools:
        _check_cards(setting_of(name), pool)
    asked = [Demand(setting_of(name), max(1, pool.min), placement_of(pool)) for name, pool in pools]
    if train:
        if (cards := run.train.placement.gpus) > 1:
            what = f"a rank uses one card, and {cards:g} are asked for"
            raise SettingError(what, "train.placement.gpus", "Set it to 1, and train.workers to the number of cards")
        asked.append(Demand("train", run.train.workers, run.train.placement))
    return [*asked, Demand("data stages", 1, Placement(cpus=1))]


def _check_cards(setting: str, pool: Pool) -> None:
    """Raise SettingError for engines that would leave cards idle, or that take more of a card than their part of it."""
    cards, share = pool.placement.gpus, pool.memory_share
    if cards > 1 and cards != pool.tensor_parallel:
        what = f"an engine with tensor_parallel {pool.tensor_parallel} uses {pool.tensor_parallel} of {cards:g} cards"
        raise SettingError(
            what, f"{setting}.placement.gpus", f"Set {setting}.tensor_parallel {cards:g}, or gpus 1 and more engines"
        )
    if 0 < cards < 1 and share > cards and not pool.colocate:
        what = f"an engine takes memory_share {share:g} of a card of which it asks for {cards:g}, and others may share the card"
        remedy = f"Set {setting}.memory_share to {cards:g} or less, gpus to 1, or engines.rollout.colocate true beside a trainer"
        raise SettingError(what, f"{setting}.placement.gpus", remedy)


def check(demands: list[Demand], nodes: list[Node]) -> None:
    """Raise ResourceError when `nodes` can never hold all `demands` at once; the error says how much of what is missing.

    Each actor must fit on some node with its labels. No resource's sum may exceed the cluster's. All actors must find places at
    one time. Whether Ray places them so is another matter: `open_engines` starts the largest first.
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
    if not _find_places(demands, nodes):
        parts = " + ".join(f"{d.count} x {_said(d.resources)} ({d.setting})" for d in demands)
        raise ResourceError(
            f"{parts}: each fits on a node and the sums suffice, but no way to place all at one time exists",
            ", ".join(d.setting for d in demands),
            "Add a node, or lower the numbers of engines and workers or their placement",
        )


def _find_places(demands: list[Demand], nodes: list[Node]) -> bool:
    """Whether all actors find places at one time. True, too, where that takes too many tries to tell.

    The actors that fit on the fewest nodes are placed first, and of these the largest. Each takes the fullest node with room, and
    another one where the rest then finds no place. Nodes that are alike count once.
    """
    names = sorted({name for demand in demands for name in demand.resources})
    largest = {name: max((node.resources.get(name, 0.0) for node in nodes), default=0.0) or 1.0 for name in names}
    order = sorted(
        (demand for demand in demands if demand.resources),
        key=lambda d: (sum(_holds(n, d) for n in nodes), -max(amount / largest[name] for name, amount in d.resources.items())),
    )
    actors = [place for place, demand in enumerate(order) for _ in range(demand.count)]
    needs = [tuple(demand.resources.get(name, 0.0) for name in names) for demand in order]
    free = [(tuple(_bears(n, d) for d in order), tuple(n.resources.get(name, 0.0) for name in names)) for n in nodes]
    tries, seen = [(0, tuple(sorted(free)))], set[object]()
    while tries and len(seen) < len(actors) + _MOST_TRIES:
        number, left = tries.pop()
        if number == len(actors):
            return True
        if (number, left) in seen:
            continue
        seen.add((number, left))
        place = actors[number]
        for node in sorted({node for node in left if node[0][place]}, reverse=True):
            rest = tuple(round(have - need, 6) for have, need in zip(node[1], needs[place], strict=True))
            if min(rest) >= 0:
                others = list(left)
                others.remove(node)
                tries.append((number + 1, tuple(sorted([*others, (node[0], rest)]))))
    return bool(tries)


def _bears(node: Node, demand: Demand) -> bool:
    """Whether a node has the labels that a demand asks for."""
    return all(node.labels.get(key) == value for key, value in demand.placement.labels.items())


def _holds(node: Node, demand: Demand) -> bool:
    """Whether one actor of a demand fits on an empty node."""
    return _bears(node, demand) and all(node.resources.get(name, 0) >= amount for name, amount in demand.resources.items())


def _said(resources: dict[str, float]) -> str:
    """Amounts of resources in words."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _shares(demands: list[Demand], name: str) -> str:
    """The settings with which small actors share CPUs, as they can be pasted. Empty for another resource."""
    whole = [d.setting for d in demands if name == "CPU" and d.resources.get(name) == 1 and d.setting != "data stages"]
    return f": --set {' --set '.join(f'{setting}.placement.cpus=0.5' for setting in whole)}" if whole else ""


def _one_fits(demand: Demand, nodes: Iterable[Node]) -> None:
    """Raise ResourceError unless one actor of `demand` fits on some node that has its labels."""
    if demand.count == 0:
        return
    labels, need = demand.placement.labels, demand.resources
    matching = [node for node in nodes if _bears(node, demand)]
    if not matching:
        wanted = ", ".join(f"{key}={value}" for key, value in labels.items())
        raise ResourceError(
            f"no node has the label {wanted}", f"{demand.setting}.placement.labels", "Start nodes with `ray start --labels`"
        )
    if any(_holds(node, demand) for node in matching):
        return
    best = {name: max(node.resources.get(name, 0) for node in matching) for name in need}
    raise ResourceError(
        f"one asks for {_said(need)}; the largest node has {_said(best)}",
        f"{demand.setting}.placement",
        "Lower it, or add larger nodes",
    )
