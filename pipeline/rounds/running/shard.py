"""One shard through one stage: computed from its inputs and committed, unless it is fresh. No Ray."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from pipeline.config import Run
from pipeline.contract import REWARD_PREFIX, Place, ShardInputs, Stage
from pipeline.errors import EgrsdError, StoreError, to_data
from pipeline.problems.sources import Problem, ProblemSet
from pipeline.rounds import seats
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import problems_digest
from pipeline.rounds.rows import read_shard
from pipeline.stages import STAGES
from pipeline.store.manifest import Entry, Origin

Item = dict[str, Any]  # a shard on its way through a chain, as plain JSON: shard, first, indices, entries, error


def bring_item(inventory: Inventory, name: str, source: ProblemSet | None, force: bool, item: Item) -> Item:
    """Bring one shard up to date in one stage. An EgrsdError travels as data, since Ray would keep only its text."""
    if item["error"]:
        return item
    try:
        problems = source.rows(item["indices"]) if source is not None else None
        entry, computed = bring_up_to_date(inventory, STAGES[name], item["shard"], item["first"], problems, force)
    except EgrsdError as error:
        return item | {"error": to_data(error)}
    return item | {"indices": [], "entries": [*item["entries"], [asdict(entry), computed]]}


def bring_up_to_date(
    inventory: Inventory, stage: Stage, shard: str, first: int, problems: list[Problem] | None = None, force: bool = False
) -> tuple[Entry, bool]:
    """Compute and commit one shard of one stage, unless it is fresh. Returns its entry and whether it was computed.

    `first` is the place of the shard's first prompt in the round. Raises StoreError when an input is missing or stale, and the
    errors of the stage.
    """
    work = inventory.work
    digest = problems_digest(problems) if problems is not None else None
    old = inventory.entry(stage.name, shard)
    if old is not None and not force and inventory.why_stale(stage, shard, digest) is None:
        return old, False
    inputs = inventory.expected_inputs(stage, shard, digest)
    if inputs is None:
        needs = ", ".join(stage.read_by(work.run).inputs)
        raise StoreError(f"an input of stage {stage.name} is missing", f"{work.area}, shard {shard}", f"Run these first: {needs}")
    if reason := inventory.stale_input(stage, shard):
        raise StoreError(
            f"an input of stage {stage.name} is stale: {reason}", f"{work.area}, shard {shard}", "Run that stage first"
        )
    start = time.perf_counter()
    result = stage.compute(_inputs_of(inventory, stage, shard, first, problems))
    origin = Origin(inventory.settings(stage), inputs, time.perf_counter() - start, result.facts)
    entry = work.store.commit(work.area, stage, shard, result.table, origin)
    return entry, True


def _inputs_of(inventory: Inventory, stage: Stage, name: str, first: int, problems: list[Problem] | None) -> ShardInputs:
    """What `stage` is given for one shard. `first` is the place of the shard's first prompt in the round."""
    work = inventory.work
    stage = stage.read_by(work.run)
    entries = {writer: entry for writer in stage.inputs if (entry := inventory.entry(writer, name)) is not None}
    return ShardInputs(
        run=work.run,
        name=name,
        place=Place(work.area, first, work.lag),
        tables=read_shard(work.store, entries, {writer: _columns(stage, writer, work.run) for writer in entries}),
        facts={writer: dict(entry.facts) for writer, entry in entries.items()},
        problems=problems,
        engines=work.engines.get(stage.name),
        policy=work.store.policy(work.policy_version) if stage.where == "engines" else None,
        baseline=work.baseline,
        scope=inventory.scope if stage.after_round else None,
        codes=work.codes,
        teachers=seats.seats_of(work) if stage.where == "engines" else {},
    )


def _columns(stage: Stage, writer: str, run: Run) -> list[str]:
    """The columns of stage `writer` that a stage is given. Those of single rewards are named by the run."""
    rewards = [f"{REWARD_PREFIX}{reward.name}" for reward in run.grade.rewards] if writer == "reward" else []
    return [*stage.reads_of(STAGES[writer]), *rewards]
