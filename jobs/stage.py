"""`egrsd stage`: bring one stage of one round up to date, and say which shards became stale."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.engines import open_engines
from jobs.opened import begin, hold_run, start
from jobs.terminal import Session, session
from pipeline.contract import Stage
from pipeline.errors import UserError
from pipeline.fit.versions import versions
from pipeline.overrides import differences, resolve
from pipeline.problems.sources import open_source
from pipeline.rounds import origin
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round, open_round, open_rounds, with_engines
from pipeline.rounds.schedule import Choice, execute, takes_ray
from pipeline.stages import PLAN, check_settings, find_stage
from pipeline.stages.reward import check as check_rewards
from pipeline.store.directory import Entry


@dataclass(frozen=True)
class Redo:
    """The options of the command line. `force` also computes fresh shards; without `shards` all shards are meant."""

    stage: str
    round: int
    sets: Sequence[str] = ()
    force: bool = False
    shards: Sequence[str] = ()


def run_stage(uri: str, asked: Redo, address: str | None = None, debug: bool = False) -> None:
    """Compute the missing and stale shards of a stage, and with `force` the fresh ones too. It reads only declared columns.

    Changed settings become the run's settings once the shards are committed. Raises UserError for an unknown stage, round or
    shard, for stale input, and for a setting that the stage does not read.
    """
    with session(debug) as out:
        stage = find_stage(asked.stage)
        store, old, _ = hold_run(out, uri)
        run = resolve(old, list(asked.sets))
        if not stage.in_run(run):
            raise UserError("this run has no rewards of its own, so `grade` does all", f"stage {stage.name}", "Set grade.rewards")
        check_settings(stage, (setting for setting, _, _ in differences(old, run)))
        work = open_round(store, run, "rounds", asked.round)
        if unknown := sorted(set(asked.shards) - work.shards.keys()):
            raise UserError(f"no shard {unknown[0]}", work.area, f"Shards: {', '.join(sorted(work.shards))}")
        only = frozenset(asked.shards or work.shards)
        inventory = Inventory(work)
        for shard in sorted(only):
            if reason := inventory.stale_input(stage, shard):
                raise UserError(
                    f"its input is stale: {reason}", f"{work.area}, shard {shard}", "Run `egrsd stage` for that stage first"
                )
        for note in check_rewards(run, work.codes, open_source(run.source)) if stage.name == "reward" else ():
            out.say(note)
        if takes_ray(run, (stage.name,), len(only)):
            start(out, store, address)
        else:
            begin(out, store)
        if going := _replaced(inventory, stage, Choice(only, asked.force)):
            out.say(f"{work.area} {stage.name}: {len(going)} shards are replaced, each once its new one is whole.")
        computed = _bring_up(work, stage, Choice(only, asked.force), out)
        for setting, was, now in differences(old, run):
            out.say(f"run.json: {setting} was {was!r}, now {now!r}.")
        store.save_run(run, versions())  # after the computation, so that settings which failed are not kept
        rows = sum(entry.rows for entry in computed)
        out.say(f"{work.area} {stage.name}: {len(computed)} shards computed ({rows} rows), {len(only) - len(computed)} fresh.")
        _tell_stale(work, stage, out)


def _replaced(inventory: Inventory, stage: Stage, choice: Choice) -> list[str]:
    """The committed shards that will be computed again. A changed source shows only when it is read, so it is not counted."""
    names = [shard for shard in inventory.work.shards if choice.has(shard) and inventory.entry(stage.name, shard) is not None]
    return [shard for shard in names if choice.force or inventory.why_stale(stage, shard) is not None]


def _bring_up(work: Round, stage: Stage, choice: Choice, out: Session) -> list[Entry]:
    """Compute shards, and return their manifest entries. No engine starts when all shards are fresh."""
    source = None if stage.reads else open_source(work.run.source)
    for text in origin.changes(work.store, {"source": source}) if source else ():
        out.say(f"note: {text}.")
    inventory = Inventory(work)
    if not choice.force and source is None and all(inventory.why_stale(stage, shard) is None for shard in choice.only or ()):
        return []
    computed: list[Entry] = []
    with contextlib.ExitStack() as stack:
        if stage.where == "engines" and stage.asks(work.run):
            work = with_engines(work, stack.enter_context(open_engines(work.run)))
        with out.console.status(f"{work.area} {stage.name}"):
            execute(
                work, (stage.name,), source, choice=choice, on_entry=lambda entry, new: computed.append(entry) if new else None
            )
    return computed


def _tell_stale(work: Round, stage: Stage, out: Session) -> None:
    """Say which shards of later stages are stale now, and in which rounds this stage has other settings."""
    inventory = Inventory(work)
    for other in PLAN[PLAN.index(stage) + 1 :]:
        reasons = inventory.reasons(other.name)
        del reasons["missing"]
        if reasons:
            count = reasons.total()
            out.say(f"now stale: {work.area} {other.name}, {count} of {len(work.shards)} shards ({min(reasons)}).")
    for other_round in open_rounds(work.store, work.run):
        if other_round.number != work.number and Inventory(other_round).reasons(stage.name)["settings"]:
            out.say(f"now stale: {other_round.area} {stage.name} (settings).")
