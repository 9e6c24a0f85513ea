"""A run in motion: rounds are measured, handed to the trainer and labelled; policies are waited for; evaluations are answered.

Engines, trainer and the screen are handed in. Engines and trainer meet only in the run directory: the driver brings a round's
shards up to date, commits the round, and labels it while the trainer, which waits for committed rounds, publishes the policy that
answers the next one. With `max_staleness` 1 the driver goes on to the next round at once, answered by the policy before.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from pipeline.config import Run
from pipeline.contract import PooledEngines, Usage
from pipeline.errors import TrainingError
from pipeline.models.tokenizer import tokenizer_of
from pipeline.problems.sources import ProblemSet, open_source
from pipeline.rounds.inventory import Inventory, commit_round, withdraw_rounds
from pipeline.rounds.metrics import summarise_round, warning
from pipeline.rounds.round import Round, evaluation_run, open_round, open_rounds, plan_round, with_engines
from pipeline.rounds.schedule import execute
from pipeline.rounds.todo import Missing
from pipeline.stages import EVALUATION, LABELS, MEASURE
from pipeline.stages.prompts import prompts
from pipeline.stages.verifier import grader_of
from pipeline.store.directory import Store
from pipeline.store.lease import Lease
from pipeline.store.manifest import Entry

_ROOM_FOR = 8  # engines
END_S = 30.0  # a trainer that waits for resources does not hear that it should stop


class Trainer(Protocol):
    """A trainer that runs beside the driver and publishes a policy for each committed round."""

    def running(self) -> bool:
        """Whether it still takes rounds."""
        ...

    def join(self) -> None:
        """Wait until it has ended. Raises what ended it."""
        ...

    def stop(self, timeout: float) -> bool:
        """Ask it to end after the step it is in; whether it has ended within `timeout` seconds. Raises nothing of it."""
        ...


class Step(Protocol):
    """Moves a bar by one."""

    def __call__(self, note: str = "") -> None:
        """One more is done; `note` stands beside the bar from now on."""
        ...


class Screen(Protocol):
    """Where the person who started the run reads how far it is."""

    def say(self, text: str) -> None:
        """Show one line."""
        ...

    def bar(self, title: str, total: int, done: int = 0) -> Step:
        """Show a bar of `total` steps of which `done` are done."""
        ...


@dataclass(frozen=True)
class Sources:
    """The run's problems and its held-out ones, open; None where the run evaluates nothing."""

    rounds: ProblemSet
    evals: ProblemSet | None

    def cautions(self) -> set[str]:
        """What the person who started the run should know of them."""
        found = {source.caution() for source in (self.rounds, self.evals) if source is not None}
        return {caution for caution in found if caution is not None}


def open_sources(run: Run) -> Sources:
    """Open the problems of a run, and check before anything starts what can be known to be wrong.

    Raises SourceError, ModelError or SettingError for a source, the model's path, its tokenizer, a chat or prompt template, or
    the answer pattern.
    """
    grader_of(run.grade)
    rounds = open_source(run.source)
    evals = open_source(run.evaluation.source) if run.evaluation.problems else None
    tokenizer = tokenizer_of(run.model)
    prompts(rounds.rows([0]), run, tokenizer)
    return Sources(rounds, evals)


@contextlib.contextmanager
def until_end(trainer: Trainer, holding: Lease) -> Iterator[Trainer]:
    """Stop a trainer at the end of a block, also when the block fails; a trainer of a driver that took the run over is left."""
    try:
        yield trainer
    finally:
        if holding.stolen_by is None:
            trainer.stop(END_S)


@dataclass(frozen=True)
class _Measured:
    """A round that is with the trainer: when it was begun (time.perf_counter) and the seconds of its parts."""

    work: Round
    begun: float
    clock: dict[str, float]


@dataclass
class Driver:
    """Brings one run to its end.

    engines: the pool that answers, by stage; empty where nothing has to be answered. start_trainer(uri, run): starts a trainer
    and returns at once; it is called only where a round is still to be trained.
    """

    store: Store
    run: Run
    sources: Sources
    engines: Mapping[str, PooledEngines]
    start_trainer: Callable[[str, Run], Trainer]
    screen: Screen

    def bring_to_end(self, missing: Missing, holding: Lease) -> None:
        """Do everything that is missing, in order. Raises StoreError when another driver has taken the run over."""
        with self._training(missing.train, holding) as trainer:
            if 0 in missing.evaluate:
                self.evaluate(0)
            for number in missing.label:
                self.label(open_round(self.store, self.run, "rounds", number))
            self.add_lost_metrics(missing)
            if trainer is not None:
                self.train_rounds(trainer, missing.train, holding)
                trainer.join()
            if self.run.rounds in missing.evaluate:
                self.evaluate(self.run.rounds)

    @contextlib.contextmanager
    def _training(self, numbers: list[int], holding: Lease) -> Iterator[Trainer | None]:
        """The trainer for the length of a block; None where no round is to be trained."""
        if not numbers:
            yield None
            return
        withdraw_rounds(self.store, numbers)  # committed before this start: committed anew once they are fresh
        with until_end(self.start_trainer(self.store.uri, self.run), holding) as trainer:
            yield trainer

    def train_rounds(self, trainer: Trainer, numbers: list[int], holding: Lease) -> None:
        """Measure one round after the other, at most `max_staleness` rounds ahead of the trainer.

        Round n is answered by policy n - max_staleness, whatever the trainer has published by then: what a run computes must not
        depend on who was faster.
        """
        step = self.screen.bar("rounds", self.run.rounds, self.run.rounds - len(numbers))
        ahead: deque[_Measured] = deque()
        for number in numbers:
            while len(ahead) > self.run.max_staleness:
                step(self._close(trainer, ahead.popleft()))
            holding.check()
            self._expect(trainer, number + 1)  # before a round of generation, not after it
            ahead.append(self.measure(number))
        for measured in ahead:
            step(self._close(trainer, measured))

    def measure(self, number: int) -> _Measured:
        """Bring a round's evidence up to date, hand it to the trainer, and label it while that works."""
        begun, before = time.perf_counter(), self._usage()
        version = max(0, number - self.run.max_staleness)
        source = self.sources.rounds
        work = plan_round(self.store, self.run, "rounds", number, version, source)
        spent: dict[str, float] = {}
        execute(with_engines(work, self.engines), MEASURE, source, inflight=self._inflight, on_entry=_counting(spent))
        commit_round(work)
        measured, now = time.perf_counter(), self._usage()
        self.label(work, spent)
        clock = {"seconds_measure": measured - begun, "seconds_label": time.perf_counter() - measured}
        clock["seconds_engines"] = max(0.0, now.busiest_s - before.busiest_s)
        clock["seconds_engines_idle"] = max(0.0, now.idle_s - before.idle_s)
        return _Measured(work, begun, clock | {f"seconds_stage_{name}": seconds for name, seconds in spent.items()})

    def label(self, work: Round, spent: dict[str, float] | None = None) -> None:
        """Profile and label a measured round; the seconds of each stage are added to `spent`."""
        execute(work, LABELS, on_entry=_counting({} if spent is None else spent))

    def evaluate(self, version: int) -> None:
        """Answer the held-out problems with a policy."""
        assert self.sources.evals is not None
        source = self.sources.evals
        work = plan_round(self.store, evaluation_run(self.run), "evals", version, version, source)
        step = self.screen.bar(f"evaluate policy {version}", len(work.shards) * len(EVALUATION))
        execute(with_engines(work, self.engines), EVALUATION, source, inflight=self._inflight, on_entry=lambda *_: step())

    def add_lost_metrics(self, missing: Missing) -> None:
        """Write the summaries of rounds whose driver died between their policy and their metrics."""
        known = {row["round"] for row in self.store.metrics() if row["writer"] == "round"}
        trained = missing.train[0] if missing.train else self.run.rounds
        for work in open_rounds(self.store, self.run):
            if work.number < trained and work.number not in known and Inventory(work).is_fresh("profile"):
                self.store.write_metrics("round", work.number, [{"round": work.number, **summarise_round(work)}])

    def _close(self, trainer: Trainer, measured: _Measured) -> str:
        """Wait for the policy that a round makes, then keep the round's figures. Returns a note for the bar."""
        number = measured.work.number
        while not self.store.has_policy(number + 1):
            self._expect(trainer, number + 1)
            time.sleep(self.store.poll_s)
        clock = measured.clock | {"seconds_round": time.perf_counter() - measured.begun}
        summary = summarise_round(measured.work)
        self.store.write_metrics("round", number, [{"round": number, **summary, **clock}])
        if (text := warning(summary)) is not None:
            self.screen.say(f"round {number}: {text}")
        return f"accuracy {summary['accuracy']:.2f}  length {summary['mean_length']:.1f}"

    def _expect(self, trainer: Trainer, version: int) -> None:
        """Raise what ended the trainer, if it ended before it published `version`."""
        if not trainer.running() and not self.store.has_policy(version):
            trainer.join()
            raise TrainingError(f"the trainer ended before it published policy {version}", self.store.uri, "Resume the run")

    def _usage(self) -> Usage:
        """What the engines have done so far, over the pools there are: one, or one each for rollout and scoring."""
        pools = [pool.usage() for pool in {id(pool): pool for pool in self.engines.values()}.values()]
        most = max((pool.most for pool in pools), default=0)
        return Usage(sum(pool.busiest_s for pool in pools), sum(pool.idle_s for pool in pools), most)

    @property
    def _inflight(self) -> int:
        """Shards that may wait on engines at one time.

        Enough for the most engines there may be, and for some that `egrsd scale` may add while the round is under way.
        """
        return self.run.engines.inflight_shards * max(_ROOM_FOR, self._usage().most)


def _counting(spent: dict[str, float]) -> Callable[[Entry, bool], None]:
    """Adds up the seconds of computed shards by stage."""

    def count(entry: Entry, computed: bool) -> None:
        if computed:
            spent[entry.stage] = spent.get(entry.stage, 0.0) + entry.seconds

    return count
