"""`egrsd stage`: bring one stage of one round up to date, and say which shards became stale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from actors.resources import demands_of
from jobs.engines import open_engines
from jobs.opened import begin, hold_run, start
from jobs.screen.progress import spinner
from jobs.screen.terminal import Session, session
from jobs.settle import parse_numbers
from pipeline.config import Run
from pipeline.contract import Stage
from pipeline.errors import SourceError, UserError, command
from pipeline.fit.versions import versions
from pipeline.inspection.staleness import tell_stale
from pipeline.overrides import differences, resolve, undoing
from pipeline.problems.sources import ProblemSet, open_source
from pipeline.rounds import contents, origin
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.metrics import add_lost, withdraw
from pipeline.rounds.round import Round, open_round, with_engines
from pipeline.rounds.running.schedule import Choice, execute, takes_ray
from pipeline.stages import PLAN, check_settings, find_stage
from pipeline.stages.reward import check as check_rewards
from pipeline.store.directory import Entry

if TYPE_CHECKING:
    from actors.pool.pool import EnginePool


@dataclass(frozen=True)
class Redo:
    """The options of the command line. `force` also computes fresh shards; without `shards` all shards are meant.

    stage: one name, or several with commas. rounds: numbers and ranges, such as `3` or `0..15`.
    """

    stage: str
    rounds: str
    sets: Sequence[str] = ()
    force: bool = False
    shards: Sequence[str] = ()


def run_stage(uri: str, asked: Redo, address: str | None = None, debug: bool = False) -> None:
    """Compute the missing and stale shards of a stage, and with `force` the fresh ones too. It reads only declared columns.

    Changed settings become the run's settings once the shards of all rounds are committed. Raises UserError for an unknown
    stage, round or shard, for stale input, and for a setting that no stage reads which is asked for.
    """
    with session(debug) as out:
        chosen = {find_stage(name.strip()) for name in asked.stage.split(",")}
        stages = [stage for stage in PLAN if stage in chosen]
        store, old, _ = hold_run(out, uri)
        run = resolve(old, list(asked.sets))
        numbers = sorted(parse_numbers(asked.rounds, "--round", "3 or 0..15"))
        changed = differences(old, run)
        for stage in stages:
            _check(stage, run, [name for name, _, _ in changed if not any(other.reads_setting(name) for other in stages)])
        works = [open_round(store, run, "rounds", number) for number in numbers]
        _check_input(works[0], stages[0], asked)
        source = _open_source(works, asked, out) if any(not stage.reads for stage in stages) else None
        models = contents.look(run) if any(stage.reads_setting("model.path") for stage in stages) else {}
        other = {model for name, _, _ in changed if (model := contents.named_by(name)) is not None}
        for note in contents.refuse_changes(store, models, accept=other, remedy=contents.way_out(store)):
            out.say(note)
        rewarded = any(stage.name == "reward" for stage in stages)
        for note in check_rewards(run, works[0].codes, open_source(run.source)) if rewarded else ():
            out.say(note)
        asking = [stage.name for stage in stages if stage.where == "engines" and stage.asks(run)]
        if any(takes_ray(run, (stage.name,), len(asked.shards or work.shards)) for work in works for stage in stages):
            start(out, store, address, demands_of(run, asking, train=False) if asking else ())
        else:
            begin(out, store)
        told = []

        @cache
        def engines() -> dict[str, EnginePool]:
            """The pools, from the first shard that needs them to the end of the verb: a large model takes minutes to load."""
            return out.exits.enter_context(open_engines(run, say=out.say, asking=asking))

        for number in numbers:
            work = open_round(store, run, "rounds", number)  # with the running baseline of the rounds before it as they are now
            told += [_redo(work, stage, asked, source, out, engines) for stage in stages]
        for setting, was, now in changed:
            out.say(f"run.json: {setting} was {was!r}, now {now!r}.")
        if back := undoing(changed):
            out.say(f"The way back: {command('stage', asked.stage, '--run', store.uri, '--round', asked.rounds, *back)}.")
        if "label" in {stage.name for stage in stages} and (apart := run.label.differs_from(run.objective, run.profile.window)):
            out.say(f"note: {apart}.")
        store.save_run(run, versions())  # after the computation, so that settings which failed are not kept
        contents.keep(store, run, models)
        add_lost(store, run)
        tell_stale(store, run, out.say)
        out.told.result = {"computed": told}


def _check(stage: Stage, run: Run, changed: list[str]) -> None:
    """Raise UserError for a stage that the run does not have, and SettingError for a changed setting that it does not read."""
    if not stage.in_run(run):
        raise UserError("this run has no rewards of its own, so `grade` does all", f"stage {stage.name}", "Set grade.rewards")
    check_settings(stage, changed)


def _check_input(work: Round, stage: Stage, asked: Redo) -> None:
    """Raise UserError for a shard that is not there, and for one with stale input, with the command that mends the input."""
    if unknown := sorted(set(asked.shards) - work.shards.keys()):
        raise UserError(f"no shard {unknown[0]}", work.area, f"Shards: {', '.join(sorted(work.shards))}")
    inventory = Inventory(work)
    for shard in sorted(asked.shards or work.shards):
        if reason := inventory.stale_input(stage, shard):
            first = command("stage", reason.partition(" ")[0], "--run", work.store.uri, "--round", asked.rounds)
            raise UserError(f"its input is stale: {reason}", f"{work.area}, shard {shard}", f"Run {first} first")


def _open_source(works: Sequence[Round], asked: Redo, out: Session) -> ProblemSet:
    """The problems that the plans of some rounds name, after a note when they are others than before.

    Raises SourceError for a source that has fewer rows by now.
    """
    store, run = works[0].store, works[0].run
    source = open_source(run.source)
    for work in works:
        rows = (index for shard in asked.shards or work.shards for index in work.shards.get(shard, ()))
        last = max(rows, default=-1)
        if last >= len(source):
            what = f"has {len(source)} rows by now, and {work.area} asks row {last}, counted from 0"
            raise SourceError(what, run.source.uri, "Put the old file back and leave source.size as it was, or start another run")
    for text in origin.changes(store, {"source": source}, bool(run.grade.rewards)):
        out.say(f"note: {text}.")
    return source


def _redo(
    work: Round, stage: Stage, asked: Redo, source: ProblemSet | None, out: Session, engines: Callable[[], dict[str, EnginePool]]
) -> dict[str, Any]:
    """Bring the chosen shards of one stage of one round up to date, and say what was done."""
    _check_input(work, stage, asked)
    only, inventory = frozenset(asked.shards or work.shards), Inventory(work)
    if going := _replaced(inventory, stage, Choice(only, asked.force)):
        out.say(f"{work.area} {stage.name}: {len(going)} shards are replaced, each once its new one is whole.")
    computed = _bring_up(work, stage, Choice(only, asked.force), None if stage.reads else source, out, engines)
    rows = sum(entry.rows for entry in computed)
    out.say(f"{work.area} {stage.name}: {len(computed)} shards computed ({rows} rows), {len(only) - len(computed)} fresh.")
    return {
        "round": work.number,
        "stage": stage.name,
        "computed": len(computed),
        "rows": rows,
        "fresh": len(only) - len(computed),
    }


def _replaced(inventory: Inventory, stage: Stage, choice: Choice) -> list[str]:
    """The committed shards that will be computed again. A changed source shows only when it is read, so it is not counted."""
    names = [shard for shard in inventory.work.shards if choice.has(shard) and inventory.entry(stage.name, shard) is not None]
    return [shard for shard in names if choice.force or inventory.why_stale(stage, shard) is not None]


def _bring_up(
    work: Round,
    stage: Stage,
    choice: Choice,
    source: ProblemSet | None,
    out: Session,
    engines: Callable[[], dict[str, EnginePool]],
) -> list[Entry]:
    """Compute shards, and return their manifest entries. No engine starts when all shards are fresh."""
    inventory = Inventory(work)
    if not choice.force and source is None and all(inventory.why_stale(stage, shard) is None for shard in choice.only or ()):
        return []
    computed: list[Entry] = []
    if stage.where == "engines" and stage.asks(work.run):
        work = with_engines(work, engines())
    if stage.reads:  # new prompts alone change no figure
        withdraw(work, times=stage.where == "CPU")
    with spinner(out, f"{work.area} {stage.name}"):
        execute(work, (stage.name,), source, choice=choice, on_entry=lambda entry, new: computed.append(entry) if new else None)
    return computed
