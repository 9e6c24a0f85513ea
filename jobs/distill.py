"""`egrsd distill`: run all rounds on one cluster, from the first round or from where the run stopped."""

from __future__ import annotations

import contextlib

from actors.pool.member import EngineClass
from actors.resources import demands_of
from actors.served import check_servers
from jobs.engines import open_engines
from jobs.opened import hold, open_folder, start
from jobs.screen.progress import open_screen, phase
from jobs.screen.terminal import Session, session
from jobs.settle import Choices, settle
from jobs.summary import summarise
from pipeline.choice.plans import prepare
from pipeline.config import Run
from pipeline.driver import Driver, Sources, cautions, open_sources
from pipeline.evidence import trackers
from pipeline.fit.versions import versions
from pipeline.inspection.outlook import departures, outlook
from pipeline.inspection.remaining import Remaining
from pipeline.live.lease import TTL_S, living_holder
from pipeline.rounds import contents, origin
from pipeline.rounds.metrics import add_lost
from pipeline.rounds.round import reward_codes
from pipeline.store.directory import Store


def distill(
    uri: str, choices: Choices, address: str | None = None, debug: bool = False, engine_class: EngineClass | None = None
) -> None:
    """Run or resume a run until every round is trained and labelled, and both evaluations exist.

    `engine_class` answers instead of vLLM; tests pass actors.fakes.FakeEngine. Raises SettingError for settings that differ
    from the run's own, and what `jobs.opened.start` raises.
    """
    with session(debug) as out:
        store = open_folder(uri)
        run = settle(store, choices, out.say)
        trackers.check(run)
        remaining = Remaining.of(store, run)
        sources = None if remaining.is_empty and not choices.dry else checked_sources(store, run, out, bool(remaining.train))
        if choices.dry and sources is not None:
            if not remaining.is_empty:
                check_content(store, run, sources, choices.accept_changes, out)
                remaining = Remaining.of(store, run, sources.evals)
                for text in prepare(store, run, sources.rounds, remaining.train, write=False):
                    out.say(text)
            preview(store, run, (remaining, sources), out)
            return
        holding = hold(out, store)
        checked, run = run, settle(store, choices)  # again: another command may have worked on the run before we got the lease
        sources = sources if run == checked else None  # else problems of one source would be stored as those of another
        remaining = Remaining.of(store, run)
        if remaining.is_empty:
            store.save_run(run, versions())
            add_lost(store, run)
            trackers.catch_up(store, run, out.say, holding)
            out.say(f"Nothing to do: all {run.rounds} rounds of {store.uri} are trained, labelled and evaluated.")
            models = contents.look(run)
            for text in [*origin.look(store, run), *contents.changes(store, models).values()]:
                out.say(f"note: {text}.")
            if choices.accept_changes:
                contents.keep(store, run, models)
        else:
            sources = sources or checked_sources(store, run, out, bool(remaining.train))
            models = check_content(store, run, sources, choices.accept_changes, out)
            other = contents.changes(store, models)
            remaining = Remaining.of(store, run, sources.evals)
            for text in prepare(store, run, sources.rounds, remaining.train):
                out.say(text)
            out.say(f"run {store.uri}: {remaining.describe(run)}")
            start(out, store, address, demands_of(run, remaining.asking, bool(remaining.train)))
            from pipeline.training import worker  # imports Ray, which reads the environment that `start` has set

            store.save_run(run, versions())
            origin.keep(store, sources.opened, bool(run.grade.rewards))
            for where in contents.forget_unfinished(store, run, other, remaining.train, remaining.evaluate):
                out.say(f"note: {where} is not finished. What another model made of it is made anew.")
            contents.keep(store, run, models)
            beside = demands_of(run, (), bool(remaining.train))
            with contextlib.ExitStack() as stack:
                stack.enter_context(trackers.feeding(store, run, out.say, holding))
                engines = (
                    stack.enter_context(open_engines(run, engine_class, store, beside, out.say, remaining.asking))
                    if remaining.asking
                    else {}
                )
                screen = stack.enter_context(open_screen(out))
                Driver(store, run, sources, engines, worker.start, screen).bring_to_end(remaining, holding)
        for line in remaining.stale:
            out.say(line)
        summarise(store, run, out)


def preview(store: Store, run: Run, found: tuple[Remaining, Sources], out: Session) -> None:
    """Print the settings that differ from the defaults, and what would be done. Nothing is written."""
    remaining, sources = found
    changed = departures(run)
    out.say("settings that differ from the defaults:")
    for name, value in changed.items():
        out.say(f"    {name}: {value!r}")
    lines = outlook(store, run, remaining, (sources.rounds, sources.evals))
    for line in lines:
        out.say(line)
    demands = demands_of(run, remaining.asking, bool(remaining.train))
    asked = "; ".join(
        f"{one.count} x {one.setting} with {one.placement.cpus:g} CPU, {one.placement.gpus:g} GPU" for one in demands
    )
    out.say(f"asked of Ray at one time: {asked}")
    if (holder := living_holder(store, TTL_S)) is not None:
        out.say(f"note: {holder} is working on this run. Any other command on it is refused until that ends.")
    out.say("Nothing was started or written. The same command without --dry-run does it.")
    out.told.result = {"settings": run.model_dump(mode="json"), "differs": changed, "would": lines}


def check_content(store: Store, run: Run, sources: Sources, accept: bool, out: Session) -> dict[str, contents.KeptModel]:
    """What the models of a run are now. A line tells each source and model that has changed, where changes are accepted.

    Raises SourceError or ModelError for a change that is not accepted.
    """
    for text in origin.refuse_changes(store, sources.opened, accept, bool(run.grade.rewards)):
        out.say(text)
    models = contents.look(run)  # after the sources are open: by then the hub's copy of tokenizers is the newest
    for text in contents.refuse_changes(store, models, accept):
        out.say(text)
    return models


def checked_sources(store: Store, run: Run, out: Session, trains: bool) -> Sources:
    """The open sources of a run, after their cautions are shown. A run that `trains` needs the servers of its teachers too.

    Raises what `open_sources` and `check_servers` raise.
    """
    with phase(out, "checking settings, problems and model"):
        sources = open_sources(run, reward_codes(store, run), begun=bool(store.numbers("rounds")))
        told = cautions(run, sources)
        if trains:
            check_servers(run)
    for caution in told:
        out.say(caution)
    return sources
