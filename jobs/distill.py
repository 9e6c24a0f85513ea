"""`egrsd distill`: rounds of roll out, grade, score, train, label on one cluster, from the first or from where the run stopped.

Engines and trainer start once and meet only in the run directory: the driver brings a round's shards up to date, commits the
round, and labels it while the trainer, which waits for committed rounds, publishes the policy that answers the next one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jobs.session import Session, connect, session, settle, versions
from pipeline.errors import EgrsdError
from pipeline.store import Entry, Store, area

if TYPE_CHECKING:
    from actors.pool import EnginePool
    from pipeline.config import Run
    from pipeline.dataset import Round
    from pipeline.sources import ProblemSet

POLL_S = 0.05


def distill(
    uri: str, recipe: str | None, sets: list[str], config: str | None, accept_changes: bool, address: str | None, debug: bool
) -> None:
    """Run or resume a run until every round is trained, labelled and both evaluations are there."""
    store = Store(uri)
    with session(debug, store) as out:
        run = settle(store, recipe, config, sets, accept_changes)
        todo = Todo.of(store, run)
        if todo.nothing:
            out.say(f"Nothing to do: all {run.rounds} rounds of {store.uri} are trained, labelled and evaluated.")
        else:
            out.say(f"run {store.uri}: {todo.text(run)}")
            sources = open_inputs(run)
            connect(address)
            check_resources(run, train=bool(todo.train))
            store.save_run(run, versions())
            store.request_stop(False)
            with Live.start(store, run, sources, out, train=bool(todo.train)) as live:
                live.bring_to_end(todo)
        from jobs.summary import summarise

        summarise(store, run, out)


@dataclass(frozen=True)
class Todo:
    """What a run still lacks: rounds to train, rounds to label, evaluations (of policy 0 and of the last)."""

    train: list[int]
    label: list[int]
    evaluate: list[int]

    @classmethod
    def of(cls, store: Store, run: Run) -> Todo:
        """Read it off the run directory. What is stale in rounds already trained is `status`'s to tell, not redone here."""
        first = store.latest_policy()
        train = list(range(first, run.rounds))
        label = [n for n in range(first) if not _has_all(store, area("rounds", n), "label")]
        evaluations = [0, run.rounds] if run.evaluation.problems else []
        return cls(train, label, [n for n in evaluations if not _has_all(store, area("evals", n), "grade")])

    @property
    def nothing(self) -> bool:
        """Whether the run is complete."""
        return not (self.train or self.label or self.evaluate)

    def text(self, run: Run) -> str:
        """What will happen, for the person who started it."""
        if len(self.train) == run.rounds:
            return f"{run.rounds} rounds of recipe {run.name}"
        parts = [f"rounds {self.train[0]} to {run.rounds - 1} to train"] if self.train else []
        parts += [f"{len(self.label)} rounds to label"] if self.label else []
        parts += [f"{len(self.evaluate)} evaluations"] if self.evaluate else []
        return "resuming: " + ", ".join(parts)


@dataclass(frozen=True)
class Sources:
    """The run's problems and its held-out ones, open."""

    rounds: ProblemSet
    evals: ProblemSet | None


def open_inputs(run: Run) -> Sources:
    """What can be known to be wrong before anything starts: sources, model path, tokenizer, chat template, prompt templates."""
    from pipeline import stages
    from pipeline.prompts import load_tokenizer
    from pipeline.sources import open_source
    from pipeline.tiny import resolve_model

    rounds = open_source(run.source)
    evals = open_source(run.evaluation.source) if run.evaluation.problems else None
    tokenizer = load_tokenizer(resolve_model(run.model.path), run.model.revision, run.model.trust_remote_code)
    stages.prompts(rounds.rows([0]), run, tokenizer)
    return Sources(rounds, evals)


def check_resources(run: Run, train: bool) -> None:
    """Raise ResourceError when the cluster can never hold engines, ranks and a data task at once, instead of waiting for it."""
    from actors import resources
    from actors.pool import cluster_nodes
    from pipeline.config import Placement

    demands = [resources.Demand("engines.rollout", max(1, run.engines.rollout.min), run.engines.rollout.placement)]
    if run.engines.score is not None:
        demands.append(resources.Demand("engines.score", max(1, run.engines.score.min), run.engines.score.placement))
    if train:
        demands.append(resources.Demand("train", run.train.workers, run.train.placement))
    resources.check([*demands, resources.Demand("data stages", 1, Placement(cpus=1))], cluster_nodes())


def _has_all(store: Store, where: str, stage: str) -> bool:
    plan = store.read_json(f"{where}/plan.json")
    return plan is not None and plan["shards"].keys() <= store.entries(where, stage).keys()


@dataclass
class Live:
    """A run in motion: its engines, its trainer, and the clock of each part."""

    store: Store
    run: Run
    out: Session
    engines: dict[str, EnginePool]
    trainer: Any
    progress: Progress
    sources: Sources

    @classmethod
    @contextlib.contextmanager
    def start(cls, store: Store, run: Run, sources: Sources, out: Session, train: bool) -> Iterator[Live]:
        """Engines and trainer come up together; both end with the block, also when it fails."""
        from pipeline.training import worker

        with contextlib.ExitStack() as stack:
            engines = stack.enter_context(open_engines(run))
            trainer = None
            if train:
                trainer = worker.start(store.uri, run)
                stack.callback(_end_trainer, store, trainer)
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            progress = stack.enter_context(Progress(*columns, TimeElapsedColumn(), console=out.console, refresh_per_second=4))
            yield cls(store, run, out, engines, trainer, progress, sources)

    def bring_to_end(self, todo: Todo) -> None:
        """Everything that is to do, in order."""
        from pipeline.dataset import open_round

        if 0 in todo.evaluate:
            self.evaluate(0)
        for number in todo.label:
            self.label(open_round(self.store, self.run, "rounds", number))
        bar = self.progress.add_task("rounds", total=self.run.rounds, completed=self.run.rounds - len(todo.train), note="")
        for number in todo.train:
            note = self.round(number)
            self.progress.update(bar, advance=1, note=note)
        if self.trainer is not None:
            self.trainer.join()
        if self.run.rounds in todo.evaluate:
            self.evaluate(self.run.rounds)

    def round(self, number: int) -> str:
        """One round: measure, hand to the trainer, label meanwhile, wait for the new policy. Returns a note for the bar."""
        from pipeline.dataset import MEASURE, commit_round, execute, plan_round, with_engines

        begun, busy = time.perf_counter(), self.engine_seconds()
        work = plan_round(self.store, self.run, "rounds", number, number, self.sources.rounds)
        spent: dict[str, float] = {}
        execute(
            with_engines(work, self.engines),
            MEASURE,
            self.sources.rounds,
            inflight=self.inflight,
            on_entry=lambda entry, computed: _count(spent, entry, computed),
        )
        commit_round(work)
        measured = time.perf_counter()
        self.label(work, spent)
        labelled = time.perf_counter()
        self.wait_for_policy(number + 1)
        ended = time.perf_counter()
        clock = {"seconds_measure": measured - begun, "seconds_label": labelled - measured, "seconds_round": ended - begun}
        clock["seconds_engines"] = self.engine_seconds() - busy
        summary = self.summarise_round(work)
        row = {"round": number, **summary, **clock, **{f"seconds_stage_{k}": v for k, v in spent.items()}}
        self.store.write_metrics("round", number, [row])
        self.warn_without_signal(number, summary)
        return f"accuracy {summary['accuracy']:.2f}  length {summary['mean_length']:.1f}"

    def engine_seconds(self) -> float:
        """Seconds that the busiest engine of each pool has worked so far."""
        pools = {id(pool): pool for pool in self.engines.values()}.values()
        return sum(max((engine.busy_s for engine in pool.status()), default=0.0) for pool in pools)

    @property
    def inflight(self) -> int:
        """Shards that may wait on engines at one time."""
        return self.run.engines.inflight_shards * max(1, self.run.engines.rollout.max)

    def label(self, work: Round, spent: dict[str, float] | None = None) -> None:
        """Profile and label a measured round."""
        from pipeline.dataset import LABELS, execute

        seconds = {} if spent is None else spent
        execute(work, LABELS, on_entry=lambda entry, computed: _count(seconds, entry, computed))

    def evaluate(self, version: int) -> None:
        """Answer the held-out problems with a policy."""
        from pipeline.dataset import evaluation_run, execute, plan_round, with_engines

        run = evaluation_run(self.run)
        assert self.sources.evals is not None
        work = plan_round(self.store, run, "evals", version, version, self.sources.evals)
        bar = self.progress.add_task(f"evaluate policy {version}", total=len(work.shards) * 3, note="")
        execute(
            with_engines(work, self.engines),
            ("prompts", "rollout", "grade"),
            self.sources.evals,
            inflight=self.inflight,
            on_entry=lambda *_: self.progress.advance(bar),
        )

    def wait_for_policy(self, version: int) -> None:
        """Until the trainer has published it. Raises what ended the trainer."""
        while not self.store.has_policy(version):
            if self.trainer is not None and (error := self.trainer.error()) is not None:
                raise error
            time.sleep(POLL_S)

    def summarise_round(self, work: Round) -> dict[str, float]:
        """Counts of a round for metrics and for the early warning."""
        import numpy as np
        import pyarrow.compute as pc

        from pipeline.metrics import regime_summary, round_summary

        def read(stage: str, columns: list[str]) -> list[Any]:
            entries = self.store.entries(work.area, stage)
            return [self.store.read(entries[shard], columns) for shard in sorted(work.shards)]

        grades = read("grade", ["reject_reason", "verdict", "reward", "advantage"])
        profiles = read("profile", ["lookahead_entropy", *(f"share_{n}" for n in ("lock", "mid", "pivot", "fork"))])
        rollouts = read("rollout", ["response_tokens"])
        lengths = [np.array(pc.drop_null(pc.list_value_length(t["response_tokens"]))) for t in rollouts]
        scored = [pc.fill_null(pc.list_value_length(t["lookahead_entropy"]), 0).to_numpy() for t in profiles]
        return round_summary(grades, lengths, self.run.rollout.group_size) | regime_summary(profiles, scored)

    def warn_without_signal(self, number: int, summary: dict[str, float]) -> None:
        """Say early, and plainly, that a round taught nothing (traps 7 and 8)."""
        rows = summary["num_rows"] - summary["num_rejected"]
        positive = summary["num_positive_advantage"]
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


def _end_trainer(store: Store, trainer: Any) -> None:
    store.request_stop()
    with contextlib.suppress(EgrsdError):  # its error, if any, has been raised by wait_for_policy
        trainer.join()
    store.request_stop(False)


@contextlib.contextmanager
def open_engines(run: Run) -> Iterator[dict[str, EnginePool]]:
    """The run's pool, or its two, by stage; closed at the end of the block."""
    from actors.pool import EnginePool

    with contextlib.ExitStack() as stack:
        pools: dict[str, EnginePool] = {}
        for name, settings in (("rollout", run.engines.rollout), ("score", run.engines.score)):
            if settings is not None:
                pool = EnginePool.start(name, run.model, settings, run.score, inflight=run.engines.inflight_shards)
                stack.callback(pool.close)
                pools[name] = pool
        yield {"rollout": pools["rollout"], "score": pools.get("score", pools["rollout"])}
