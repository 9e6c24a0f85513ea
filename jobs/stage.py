"""`egrsd stage`: bring one stage of one round up to date, and say what that made stale."""

from __future__ import annotations

import contextlib

from jobs.session import Session, check_reach, connect, session, versions
from pipeline import contract
from pipeline.config import Run, differences, resolve
from pipeline.errors import SettingError, UserError, nearest
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round, open_round, open_rounds, with_engines
from pipeline.stages import PLAN, STAGES
from pipeline.store import lease
from pipeline.store.directory import Entry, Store


def run_stage(
    name: str, uri: str, number: int, sets: list[str], force: bool, shards: list[str] | None, address: str | None, debug: bool
) -> None:
    """Compute the missing and stale shards of a stage (with `force` the fresh ones too), reading only what it declares.

    `sets` may change settings the stage reads; they become the run's settings. Raises UserError on an unknown stage, round,
    shard, or on a setting the stage does not read.
    """
    with session(debug) as out:
        stage, store = find_stage(name), Store(uri)
        store.load_run()
        out.exits.enter_context(lease.held(store))
        old = store.load_run()
        run = resolve(old, sets)
        _check_settings(stage, old, run)
        work = open_round(store, run, "rounds", number)
        if unknown := sorted(set(shards or []) - work.shards.keys()):
            raise UserError(f"no shard {unknown[0]}", work.area, f"Shards: {', '.join(sorted(work.shards))}")
        only = set(shards) if shards else set(work.shards)
        seen = Inventory(work)
        for shard in sorted(only):
            if reason := seen.stale_input(stage, shard):
                raise UserError(
                    f"its input is stale: {reason}", f"{work.area}, shard {shard}", "Run `egrsd stage` for that stage first"
                )
        out.log_to(store)
        connect(address)
        check_reach(store)
        computed = _bring_up(work, stage, force, only, out)
        store.save_run(run, versions())  # settings that failed are not kept
        rows = sum(entry.rows for entry in computed)
        out.say(f"{work.area} {name}: {len(computed)} shards computed ({rows} rows), {len(only) - len(computed)} fresh.")
        _tell_stale(work, stage, out)


def find_stage(name: str) -> contract.Stage:
    """A stage by name. Raises UserError that lists those there are."""
    if name not in STAGES:
        raise UserError(f"unknown stage '{name}'", "egrsd stage", nearest(name, STAGES, f"Stages: {', '.join(STAGES)}"))
    return STAGES[name]


def _check_settings(stage: contract.Stage, old: Run, new: Run) -> None:
    for setting, _, _ in differences(old, new):
        if not _reads(stage, setting) and not setting.startswith("engines."):
            readers = [s.name for s in PLAN if _reads(s, setting)]
            hint = (
                f"It is read by: {', '.join(readers)}"
                if readers
                else "No stage reads it; pass it to `egrsd distill` or `egrsd train`"
            )
            raise SettingError(f"stage {stage.name} does not read this setting", setting, hint)


def _reads(stage: contract.Stage, setting: str) -> bool:
    return any(setting == name or setting.startswith(f"{name}.") for name in stage.settings)


def _bring_up(work: Round, stage: contract.Stage, force: bool, only: set[str], out: Session) -> list[Entry]:
    from jobs.engines import open_engines
    from pipeline.problems.sources import open_source
    from pipeline.rounds.schedule import execute

    source = open_source(work.run.source) if stage.name == "prompts" else None
    seen = Inventory(work)
    if not force and source is None and all(seen.why_stale(stage, shard) is None for shard in only):
        return []
    computed: list[Entry] = []
    with contextlib.ExitStack() as stack:
        if stage.where == "engines":
            work = with_engines(work, stack.enter_context(open_engines(work.run)))
        with out.console.status(f"{work.area} {stage.name}"):
            execute(
                work, (stage.name,), source, force=force, only=only, on_entry=lambda e, new: computed.append(e) if new else None
            )
    return computed


def _tell_stale(work: Round, stage: contract.Stage, out: Session) -> None:
    later = PLAN[PLAN.index(stage) + 1 :]
    seen = Inventory(work)
    for other in later:
        reasons = seen.reasons(other.name)
        del reasons["missing"]
        if reasons:
            reason = min(reasons)
            out.say(f"now stale: {work.area} {other.name}, {reasons.total()} of {len(work.shards)} shards ({reason}).")
    for other_round in open_rounds(work.store, work.run):
        if other_round.number != work.number and Inventory(other_round).reasons(stage.name)["settings"]:
            out.say(f"now stale: {other_round.area} {stage.name} (settings).")
