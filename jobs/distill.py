"""`egrsd distill`: every round of a run on one cluster, from the first or from where the run stopped."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from actors.resources import demands_of
from jobs.engines import open_engines
from jobs.opened import hold, open_folder, start
from jobs.progress import open_screen
from jobs.settle import Choices, settle
from jobs.summary import summarise
from jobs.terminal import session
from pipeline.driver import Driver, open_sources
from pipeline.evidence import trackers
from pipeline.fit.versions import versions
from pipeline.rounds.remaining import Remaining
from pipeline.training import worker

if TYPE_CHECKING:
    from actors.member import EngineClass


def distill(
    uri: str, choices: Choices, address: str | None = None, debug: bool = False, engine_class: EngineClass | None = None
) -> None:
    """Run or resume a run until every round is trained, labelled and both evaluations are there.

    `engine_class` answers instead of vLLM: tests of scale and chaos hand in actors.fakes.FakeEngine.
    """
    with session(debug) as out:
        store = open_folder(uri)
        run = settle(store, choices)
        remaining = Remaining.of(store, run)
        trackers.check(run)
        if remaining.is_empty:
            trackers.catch_up(store, run, out.say)
            store.save_run(run, versions())
            out.say(f"Nothing to do: all {run.rounds} rounds of {store.uri} are trained, labelled and evaluated.")
        else:
            sources = open_sources(run)
            for caution in sources.cautions():
                out.say(caution)
            holding = hold(out, store)
            run = settle(store, choices)  # again: whoever held the run before may have gone on
            remaining = Remaining.of(store, run)
            out.say(f"run {store.uri}: {remaining.describe(run)}")
            start(out, store, address, demands_of(run, remaining.needs_engines, bool(remaining.train)))
            store.save_run(run, versions())
            beside = demands_of(run, engines=False, train=bool(remaining.train))
            with contextlib.ExitStack() as stack:
                stack.enter_context(trackers.feeding(store, run, out.say, holding))
                engines = stack.enter_context(open_engines(run, engine_class, store, beside)) if remaining.needs_engines else {}
                screen = stack.enter_context(open_screen(out))
                Driver(store, run, sources, engines, worker.start, screen).bring_to_end(remaining, holding)
        for line in remaining.stale:
            out.say(line)
        summarise(store, run, out)
