"""`egrsd stage`: bring one stage of one round up to date, and say what that made stale."""

from __future__ import annotations

import contextlib
import difflib

from jobs.session import Session, connect, session, versions
from pipeline import contract
from pipeline.config import Run, differences, resolve
from pipeline.dataset import Round, execute, open_round, why_stale, with_engines
from pipeline.errors import SettingError, UserError
from pipeline.store import Entry, Store


def run_stage(
    name: str, uri: str, number: int, sets: list[str], force: bool, shards: list[str] | None, address: str | None, debug: bool
) -> None:
    """Compute the missing and stale shards of a stage (with `force` the fresh ones too), reading only what it declares.

    `sets` may change settings the stage reads; they become the run's settings. Raises UserError on an unknown stage, round,
    shard, or on a setting the stage does not read.
    """
    store = Store(uri)
    old = store.load_run() if store.exists() else None
    with session(debug, store if old else None) as out:
        stage = find_stage(name)
        old = store.load_run()
        run = resolve(old, sets)
        _check_settings(stage, old, run)
        work = open_round(store, run, "rounds", number)
        if unknown := sorted(set(shards or []) - work.shards.keys()):
            raise UserError(f"no shard {unknown[0]}", work.area, f"Shards: {', '.join(sorted(work.shards))}")
        if run != old:
            store.save_run(run, versions())
        computed = _bring_up(work, stage, force, set(shards) if shards else None, address, out)
        rows = sum(entry.rows for entry in computed)
        out.say(f"{work.area} {name}: {len(computed)} shards computed ({rows} rows), {len(work.shards) - len(computed)} fresh.")
        _tell_stale(work, stage, out)


def find_stage(name: str) -> contract.Stage:
    """A stage by name. Raises UserError that lists those there are."""
    if name not in contract.STAGES:
        near = difflib.get_close_matches(name, contract.STAGES, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"Stages: {', '.join(contract.STAGES)}"
        raise UserError(f"unknown stage '{name}'", "egrsd stage", hint)
    return contract.STAGES[name]


def _check_settings(stage: contract.Stage, old: Run, new: Run) -> None:
    for setting, _, _ in differences(old, new):
        section = setting.split(".")[0]
        if section not in (*stage.settings, "engines"):
            readers = [s.name for s in contract.PLAN if section in s.settings]
            hint = (
                f"It is read by: {', '.join(readers)}"
                if readers
                else "No stage reads it; pass it to `egrsd distill` or `egrsd train`"
            )
            raise SettingError(f"stage {stage.name} does not read this setting", setting, hint)


def _bring_up(
    work: Round, stage: contract.Stage, force: bool, only: set[str] | None, address: str | None, out: Session
) -> list[Entry]:
    from jobs.distill import open_engines
    from pipeline.sources import open_source

    source = open_source(work.run.source) if stage.name == "prompts" else None
    if not force and all(why_stale(work, stage, shard) is None for shard in work.shards) and source is None:
        return []
    computed: list[Entry] = []
    with contextlib.ExitStack() as stack:
        connect(address)
        if stage.where == "engines":
            work = with_engines(work, stack.enter_context(open_engines(work.run)))
        with out.console.status(f"{work.area} {stage.name}"):
            execute(
                work, (stage.name,), source, force=force, only=only, on_entry=lambda e, new: computed.append(e) if new else None
            )
    return computed


def _tell_stale(work: Round, stage: contract.Stage, out: Session) -> None:
    later = contract.PLAN[contract.PLAN.index(stage) + 1 :]
    for other in later:
        stale = [
            shard
            for shard in sorted(work.shards)
            if work.store.entry(work.area, other.name, shard) and why_stale(work, other, shard)
        ]
        if stale:
            reason = why_stale(work, other, stale[0])
            out.say(f"now stale: {work.area} {other.name}, {len(stale)} of {len(work.shards)} shards ({reason}).")
    for number in work.store.numbers("rounds"):
        round_ = open_round(work.store, work.run, "rounds", number)
        if number != work.number and any(why_stale(round_, stage, shard) == "settings" for shard in round_.shards):
            out.say(f"now stale: {round_.area} {stage.name} (settings).")
