"""`egrsd distill`: rounds of roll out, grade, score, train, label on one cluster, from the first or from where the run stopped.

Engines and trainer start once and meet only in the run directory: the driver brings a round's shards up to date, commits the
round, and labels it while the trainer, which waits for committed rounds, publishes the policy that answers the next one. With
`max_staleness` 1 the driver goes on to the next round at once, answered by the policy before.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from jobs.engines import open_engines
from jobs.opened import hold, start
from jobs.progress import Bars
from jobs.settle import settle
from jobs.terminal import Session, session
from pipeline.errors import TrainingError
from pipeline.evidence import trackers
from pipeline.fit.versions import versions
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round
from pipeline.rounds.todo import Missing, incomplete
from pipeline.stages import EVALUATION
from pipeline.store import lease
from pipeline.store.directory import Entry, Store, area

if TYPE_CHECKING:
    from actors.pool import EnginePool
    from actors.resources import Demand
    from actors.serving import EngineClass, PoolStatus
    from pipeline.config import Run
    from pipeline.problems.sources import ProblemSet

_ROOM_FOR = 8  # engines
END_S = 30.0  # a trainer that waits for resources does not hear that it should stop


def distill(
    uri: str,
    recipe: str | None,
    sets: list[str],
    config: str | None,
    accept_changes: bool,
    address: str | None,
    debug: bool,
    engine_class: EngineClass | None = None,
) -> None:
    """Run or resume a run until every round is trained, labelled and both evaluations are there.

    `engine_class` answers instead of vLLM: tests of scale and chaos hand in actors.fakes.FakeEngine.
    """
    with session(debug) as out:
        store = Store(uri)
        run = settle(store, recipe, config, sets, accept_changes)
        missing = Missing.of(store, run)
        trackers.check(run)
        if not missing.nothing:
            sources = open_inputs(run)
            for caution in {source.caution() for source in (sources.rounds, sources.evals) if source} - {None}:
                out.say(str(caution))
            holding = hold(out, store)
            run = settle(store, recipe, config, sets, accept_changes)  # again: whoever held the run before may have gone on
            missing = Missing.of(store, run)
            out.say(f"run {store.uri}: {missing.text(run)}")
            start(out, store, address)
            check_resources(run, missing, out)
            store.save_run(run, versions())
            with (
                trackers.feeding(store, run, out.say, holding),
                Live.start(store, run, sources, out, missing, holding, engine_class) as live,
            ):
                live.bring_to_end(missing, holding)
        else:
            trackers.catch_up(store, run, out.say)
            store.save_run(run, versions())
            out.say(f"Nothing to do: all {run.rounds} rounds of {store.uri} are trained, labelled and evaluated.")
        for line in missing.stale:
            out.say(line)
        from jobs.summary import summarise

        summarise(store, run, out)


@dataclass(frozen=True)
class Sources:
    """The run's problems and its held-out ones, open."""

    rounds: ProblemSet
    evals: ProblemSet | None


def open_inputs(run: Run) -> Sources:
    """What can be known to be wrong before anything starts: sources, model path, tokenizer, chat and prompt templates,
    the answer pattern."""
    from pipeline.models.tokenizer import tokenizer_of
    from pipeline.problems.sources import open_source
    from pipeline.stages.prompts import prompts
    from pipeline.stages.verifier import grader_of

    grader_of(run.grade)
    rounds = open_source(run.source)
    evals = open_source(run.evaluation.source) if run.evaluation.problems else None
    tokenizer = tokenizer_of(run.model)
    prompts(rounds.rows([0]), run, tokenizer)
    return Sources(rounds, evals)


def check_resources(run: Run, missing: Missing, out: Session) -> None:
    """Raise ResourceError when the cluster can never hold engines, ranks and a data task at once, instead of waiting for it.

    Where an autoscaler may add what is missing, say so and go on.
    """
    from actors.pool import check_room

    if lacking := check_room(demands(run, missing)):
        out.say(f"the cluster's autoscaler is asked for nodes: {lacking}.")


def demands(run: Run, missing: Missing) -> list[Demand]:
    """What is asked of the cluster at one time: engines at their fewest, ranks, and a data task."""
    from actors import resources
    from pipeline.config import Placement

    asked = []
    for name, pool in (("rollout", run.engines.rollout), ("score", run.engines.score)):
        if pool is not None and missing.on_engines:
            asked.append(resources.Demand(f"engines.{name}", max(1, pool.min), pool.placement))
    if missing.train:
        asked.append(resources.Demand("train", run.train.workers, run.train.placement))
    return [*asked, resources.Demand("data stages", 1, Placement(cpus=1))]


@dataclass(frozen=True)
class Measured:
    """A round that is with the trainer: when it was begun (time.perf_counter) and the seconds of its parts."""

    work: Round
    begun: float
    clock: dict[str, float]


@dataclass(frozen=True)
class EngineSeconds:
    """Seconds since the run began: of work of the busiest engine of each pool, and of idleness added up over engines."""

    busiest: float
    idle: float


@dataclass
class Live:
    """A run in motion: its engines, its trainer, and the clock of each part."""

    store: Store
    run: Run
    out: Session
    engines: dict[str, EnginePool]
    trainer: Any
    progress: Bars
    sources: Sources

    @classmethod
    @contextlib.contextmanager
    def start(
        cls,
        store: Store,
        run: Run,
        sources: Sources,
        out: Session,
        missing: Missing,
        holding: lease.Lease,
        engine_class: EngineClass | None = None,
        engines: dict[str, EnginePool] | None = None,
    ) -> Iterator[Live]:
        """Engines and trainer come up together; both end with the block, also when it fails. `engines` that are given stay up."""
        from pipeline.training import worker

        with contextlib.ExitStack() as stack:
            if engines is None:
                beside = [demand for demand in demands(run, missing) if not demand.setting.startswith("engines.")]
                engines = stack.enter_context(open_engines(run, engine_class, store, beside)) if missing.on_engines else {}
            trainer = None
            if missing.train:
                for number in set(missing.train) & set(
                    store.numbers("rounds")
                ):  # committed before this start: the driver commits them anew once they are fresh
                    store.delete(f"{area('rounds', number)}/ready.json")
                trainer = worker.start(store.uri, run)
                stack.callback(lambda: holding.stolen_by or trainer.stop(END_S))  # another driver's trainer is not ours to stop
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            progress = stack.enter_context(Bars(*columns, TimeElapsedColumn(), console=out.console, refresh_per_second=4))
            yield cls(store, run, out, engines, trainer, progress, sources)

    def bring_to_end(self, missing: Missing, holding: lease.Lease) -> None:
        """Everything that is to do, in order. Raises StoreError when another driver has taken the run over."""
        from pipeline.rounds.round import open_round

        if 0 in missing.evaluate:
            self.evaluate(0)
        for number in missing.label:
            self.label(open_round(self.store, self.run, "rounds", number))
        self.add_lost_metrics(missing)
        self.train_rounds(missing.train, holding)
        if self.trainer is not None:
            self.trainer.join()
        if self.run.rounds in missing.evaluate:
            self.evaluate(self.run.rounds)

    def train_rounds(self, numbers: list[int], holding: lease.Lease) -> None:
        """Measure one round after the other, at most `max_staleness` rounds ahead of the trainer.

        Round n is answered by policy n - max_staleness, whatever the trainer has published by then: what a run computes must not
        depend on who was faster.
        """
        done = self.run.rounds - len(numbers)
        bar = self.progress.add_task("rounds", total=self.run.rounds, completed=done, note="")
        ahead: deque[Measured] = deque()
        for number in numbers:
            while len(ahead) > self.run.max_staleness:
                self.progress.update(bar, advance=1, note=self.close(ahead.popleft()))
            holding.check()
            self.expect_trainer(number + 1)  # before a round of generation, not after it
            ahead.append(self.measure(number))
        for measured in ahead:
            self.progress.update(bar, advance=1, note=self.close(measured))

    def measure(self, number: int) -> Measured:
        """Bring a round's evidence up to date, hand it to the trainer, and label it while that works."""
        from pipeline.rounds.inventory import commit_round
        from pipeline.rounds.round import plan_round, with_engines
        from pipeline.rounds.schedule import execute
        from pipeline.stages import MEASURE

        begun, busy = time.perf_counter(), self.engine_seconds()
        version = max(0, number - self.run.max_staleness)
        work = plan_round(self.store, self.run, "rounds", number, version, self.sources.rounds)
        spent: dict[str, float] = {}
        execute(
            with_engines(work, self.engines),
            MEASURE,
            self.sources.rounds,
            inflight=self.inflight,
            on_entry=lambda entry, computed: _count(spent, entry, computed),
        )
        commit_round(work)
        measured, now = time.perf_counter(), self.engine_seconds()
        self.label(work, spent)
        clock = {"seconds_measure": measured - begun, "seconds_label": time.perf_counter() - measured}
        clock |= {"seconds_engines": max(0.0, now.busiest - busy.busiest), "seconds_engines_idle": max(0.0, now.idle - busy.idle)}
        return Measured(work, begun, clock | {f"seconds_stage_{name}": seconds for name, seconds in spent.items()})

    def close(self, measured: Measured) -> str:
        """Wait for the policy that a round makes, then keep the round's figures. Returns a note for the bar."""
        number = measured.work.number
        self.wait_for_policy(number + 1)
        clock = measured.clock | {"seconds_round": time.perf_counter() - measured.begun}
        summary = self.summarise_round(measured.work)
        self.store.write_metrics("round", number, [{"round": number, **summary, **clock}])
        self.warn_without_signal(number, summary)
        return f"accuracy {summary['accuracy']:.2f}  length {summary['mean_length']:.1f}"

    def pools(self) -> list[PoolStatus]:
        """Its pools now: one, or one each for rollout and scoring."""
        return [pool.overview() for pool in {id(pool): pool for pool in self.engines.values()}.values()]

    def engine_seconds(self) -> EngineSeconds:
        """What engines have done so far."""
        pools = self.pools()
        busiest = sum(max((engine.busy_s for engine in pool.engines), default=0.0) for pool in pools)
        return EngineSeconds(busiest, sum(pool.serving_s - pool.working_s for pool in pools))

    @property
    def inflight(self) -> int:
        """Shards that may wait on engines at one time: enough for the most engines there may be, and for some that `egrsd scale`
        may add while the round is under way."""
        return self.run.engines.inflight_shards * max(_ROOM_FOR, *(pool.most for pool in self.pools()), 1)

    def label(self, work: Round, spent: dict[str, float] | None = None) -> None:
        """Profile and label a measured round."""
        from pipeline.rounds.schedule import execute
        from pipeline.stages import LABELS

        seconds = {} if spent is None else spent
        execute(work, LABELS, on_entry=lambda entry, computed: _count(seconds, entry, computed))

    def evaluate(self, version: int) -> None:
        """Answer the held-out problems with a policy."""
        from pipeline.rounds.round import evaluation_run, plan_round, with_engines
        from pipeline.rounds.schedule import execute

        run = evaluation_run(self.run)
        assert self.sources.evals is not None
        work = plan_round(self.store, run, "evals", version, version, self.sources.evals)
        bar = self.progress.add_task(f"evaluate policy {version}", total=len(work.shards) * 3, note="")
        execute(
            with_engines(work, self.engines),
            EVALUATION,
            self.sources.evals,
            inflight=self.inflight,
            on_entry=lambda *_: self.progress.advance(bar),
        )

    def wait_for_policy(self, version: int) -> None:
        """Until the trainer has published it. Raises what ended the trainer."""
        while not self.store.has_policy(version):
            self.expect_trainer(version)
            time.sleep(self.store.poll_s)

    def expect_trainer(self, version: int) -> None:
        """Raise what ended the trainer, if it ended before it published `version`."""
        if not self.trainer.running() and not self.store.has_policy(version):
            self.trainer.join()
            raise TrainingError(f"the trainer ended before it published policy {version}", self.store.uri, "Resume the run")

    def add_lost_metrics(self, missing: Missing) -> None:
        """Summaries of rounds whose driver died between their policy and their metrics."""
        from pipeline.rounds.round import open_rounds

        known = {row["round"] for row in self.store.metrics() if row["writer"] == "round"}
        trained = missing.train[0] if missing.train else self.run.rounds
        for work in open_rounds(self.store, self.run):
            if work.number < trained and work.number not in known and not incomplete(Inventory(work), ("profile",)):
                self.store.write_metrics("round", work.number, [{"round": work.number, **self.summarise_round(work)}])

    def summarise_round(self, work: Round) -> dict[str, float]:
        """Counts of a round for metrics and for the early warning."""
        import numpy as np
        import pyarrow.compute as pc

        from pipeline.rounds.metrics import regime_summary, round_summary

        def read(stage: str, columns: list[str]) -> list[Any]:
            """These columns of every shard of a stage."""
            entries = self.store.entries(work.area, stage)
            return [self.store.read(entries[shard], columns) for shard in sorted(work.shards)]

        grades = read("grade", ["reject_reason", "verdict", "reward", "advantage"])
        profiles = read("profile", ["lookahead_entropy", *(f"share_{n}" for n in ("lock", "mid", "pivot", "fork"))])
        rollouts = read("rollout", ["response_tokens"])
        lengths = [np.array(pc.drop_null(pc.list_value_length(t["response_tokens"]))) for t in rollouts]
        scored = [pc.fill_null(pc.list_value_length(t["lookahead_entropy"]), 0).to_numpy() for t in profiles]
        shares = regime_summary(profiles, scored)
        return {"policy_lag": work.lag, **round_summary(grades, lengths, self.run.rollout.group_size), **shares}

    def warn_without_signal(self, number: int, summary: dict[str, float]) -> None:
        """Say early, and plainly, that a round taught nothing."""
        rows = summary["num_rows"] - summary["num_rejected"]
        positive = summary["num_positive_advantage"]
        if not rows:
            self.out.say(
                f"round {number}: nothing to learn from. All {summary['num_rows']:.0f} rows were rejected: `egrsd status`."
            )
        if rows and summary["num_correct"] == 0:
            self.out.say(
                f"round {number}: no signal. None of {rows:.0f} traces was correct "
                f"({summary['num_truncated']:.0f} truncated, {summary['num_unparsable']:.0f} unparsable): every reward is 0. "
                "Choose easier problems, more traces per prompt or a higher rollout.max_new_tokens."
            )
        elif rows and positive < 0.02 * rows:
            self.out.say(f"round {number}: weak signal. {positive:.0f} of {rows:.0f} traces have a positive advantage.")


def _count(seconds: dict[str, float], entry: Entry, computed: bool) -> None:
    if computed:
        seconds[entry.stage] = seconds.get(entry.stage, 0.0) + entry.seconds
