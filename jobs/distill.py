"""`egrsd distill`: run all rounds on one cluster, from the first round or from where the run stopped."""

from __future__ import annotations

import contextlib

from actors.pool.member import EngineClass
from actors.resources import demands_of
from jobs.engines import open_engines
from jobs.opened import hold, open_folder, start
from jobs.progress import open_screen
from jobs.settle import Choices, settle
from jobs.summary import summarise
from jobs.terminal import Session, session
from pipeline.choice.plans import prepare
from pipeline.config import Run
from pipeline.driver import Driver, Sources, cautions, open_sources
from pipeline.evidence import trackers
from pipeline.fit.versions import versions
from pipeline.inspection.remaining import Remaining
from pipeline.rounds import origin
from pipeline.rounds.round import reward_codes
from pipeline.store.directory import Store
from pipeline.training import worker


def distill(
    uri: str, choices: Choices, address: str | None = None, debug: bool = False, engine_class: EngineClass | None = None
) -> None:
    """Run or resume a run until every round is trained and labelled, and both evaluations exist.

    `engine_class` answers instead of vLLM; tests pass actors.fakes.FakeEngine. Raises SettingError for settings that differ
    from the run's own, and what `jobs.opened.start` raises.
    """
    with session(debug) as out:
        store = open_folder(uri)
        run = settle(store, choices)
        trackers.check(run)
        sources = None if Remaining.of(store, run).is_empty else checked_sources(store, run, out)
        holding = hold(out, store)
        run = settle(store, choices)  # read again: another command may have worked on the run before we got the lease
        remaining = Remaining.of(store, run)
        if remaining.is_empty:
            store.save_run(run, versions())
            trackers.catch_up(store, run, out.say, holding)
            out.say(f"Nothing to do: all {run.rounds} rounds of {store.uri} are trained, labelled and evaluated.")
            for text in origin.look(store, run):
                out.say(f"note: {text}.")
        else:
            sources = sources or checked_sources(store, run, out)
            for text in origin.refuse_changes(store, sources.opened, choices.accept_changes):
                out.say(text)
            remaining = Remaining.of(store, run, sources.evals)
            for text in prepare(store, run, sources.rounds, remaining.train):
                out.say(text)
            out.say(f"run {store.uri}: {remaining.describe(run)}")
            start(out, store, address, demands_of(run, remaining.needs_engines, bool(remaining.train)))
            store.save_run(run, versions())
            origin.keep(store, sources.opened)
            beside = demands_of(run, engines=False, train=bool(remaining.train))
            with contextlib.ExitStack() as stack:
                stack.enter_context(trackers.feeding(store, run, out.say, holding))
                engines = stack.enter_context(open_engines(run, engine_class, store, beside)) if remaining.needs_engines else {}
                screen = stack.enter_context(open_screen(out))
                Driver(store, run, sources, engines, worker.start, screen).bring_to_end(remaining, holding)
        for line in remaining.stale:
            out.say(line)
        summarise(store, run, out)


def checked_sources(store: Store, run: Run, out: Session) -> Sources:
    """The open sources of a run, after their cautions are shown. Raises what `open_sources` raises."""
    sources = open_sources(run, reward_codes(store, run), begun=bool(store.numbers("rounds")))
    for caution in cautions(run, sources):
        out.say(caution)
    return sources
