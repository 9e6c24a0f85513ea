"""The driver of a run: it measures, commits and labels rounds, waits for policies, and has evaluations answered.

Engines, trainer and screen are handed in. Engines and trainer meet only in the run directory. The driver brings the shards of a
round up to date, commits the round, and labels it. Meanwhile the trainer, which waits for committed rounds, publishes the next
policy. That policy answers the next round. With `max_staleness` 1 the driver goes on to the next round at once, and the policy
before answers it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from pipeline.choice.plans import Planner
from pipeline.config import Run
from pipeline.config.objective import SCALES_ADVANTAGE, approximation
from pipeline.contract import PooledEngines
from pipeline.errors import TrainingError
from pipeline.evidence.evaluation import answer
from pipeline.evidence.teachers import probe_teachers, sample_teachers
from pipeline.fit.footprint import check_cache
from pipeline.fit.machine import vllm_for_gpus
from pipeline.grader.code import Code, codes_of
from pipeline.grader.verifier import grader_of
from pipeline.inspection.remaining import Remaining
from pipeline.inspection.staleness import among
from pipeline.live.lease import Lease
from pipeline.models import fitness
from pipeline.models.resolve import vocabulary_size
from pipeline.models.tokenizers.agreement import check_teachers
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.notices import NOTICE_S, late
from pipeline.problems.sources import ProblemSet, epoch_indices, look_for, open_source
from pipeline.problems.survey import COSTS, compared, is_generated, survey
from pipeline.rounds.inventory import commit_round, withdraw_rounds
from pipeline.rounds.metrics import add_lost, summarise_round, warning, withdraw
from pipeline.rounds.refused import (
    refuse_few_imports,
    refuse_mixed_control,
    refuse_nothing_left,
    refuse_unknown_teachers,
    refuse_unusable,
    refuse_wide_bounds,
)
from pipeline.rounds.round import Round, evaluation_run, open_round, plan_round, with_engines
from pipeline.rounds.rows import left_out
from pipeline.rounds.running.schedule import Computed, execute, inflight, pools_of, usage
from pipeline.rounds.tally import told
from pipeline.stages import EVALUATION, LABELS, MEASURE, chain_of
from pipeline.stages.chat import controls, unheard_end
from pipeline.stages.grade import check_references
from pipeline.stages.reward import check as check_rewards
from pipeline.stages.template import get_ready
from pipeline.store.directory import Store
from pipeline.training.agreement import base_model, teachers

END_S = 30.0  # limited, since a trainer that waits for resources does not look for a request to stop


class TrainerHandle(Protocol):
    """A trainer that runs beside the driver and publishes a policy for each committed round."""

    def running(self) -> bool:
        """Whether the trainer still takes rounds."""
        ...

    def join(self) -> None:
        """Wait until the trainer has ended. Raises the error that ended it."""
        ...

    def stop(self, timeout: float) -> bool:
        """Ask the trainer to end after its current step. Returns whether it ended within `timeout` seconds.

        The trainer's own error is not raised here.
        """
        ...


class Advance(Protocol):
    """Moves a progress bar forward by one."""

    def __call__(self, note: str = "") -> None:
        """Count one more as done, and show `note` beside the bar from now on."""
        ...


class Screen(Protocol):
    """Where the person who started the run reads its progress."""

    def say(self, text: str) -> None:
        """Show one line."""
        ...

    def bar(self, title: str, total: int, done: int = 0) -> Advance:
        """Show a progress bar of `total` steps, of which `done` are done."""
        ...


@dataclass(frozen=True)
class Sources:
    """The open sources of a run: problems of its rounds, and held-out problems. `evals` is None in a run without evaluations.

    codes: the code of each reward, as it was checked. A file that is edited meanwhile changes nothing until the next command.
    """

    rounds: ProblemSet
    evals: ProblemSet | None
    notes: tuple[str, ...] = ()
    codes: dict[str, Code] = field(default_factory=dict)

    @property
    def opened(self) -> dict[str, ProblemSet]:
        """The sources by the names of their settings."""
        return {"source": self.rounds} | ({"evaluation.source": self.evals} if self.evals is not None else {})


def open_sources(run: Run, codes: dict[str, Code] | None = None, begun: bool = False) -> Sources:
    """Open the problems of a run, and check before anything starts all that can be checked without an engine.

    `codes` has the code of each reward; without it their files are read now. begun: whether the run has rounds already.

    Raises SourceError for a source, and ModelError for the model's path, tokenizer or chat template. Raises SettingError for a
    prompt template, the answer pattern, score.keep_topk or a reward. Raises UserError when no prompt of the first round, or none
    of the evaluation, can be answered.
    """
    look_for(run.source)
    if run.evaluation.problems:
        look_for(run.evaluation.source, "evaluation.source")
    refuse_mixed_control(run.objective)
    get_ready()
    grader_of(run)
    check_teachers(run)
    notes: list[str | None] = [*fitness.check(run, vllm_for_gpus(), begun), unheard_end(run.model)]
    check_cache(run)
    if run.score.keep_topk:
        run.score.check_vocabulary(vocabulary_size(run.model))
    rounds = open_source(run.source)
    refuse_unknown_teachers(rounds, run)
    evals = (
        open_source(run.evaluation.source, setting="evaluation.source").without_solutions() if run.evaluation.problems else None
    )
    notes += [refuse_few_imports(rounds, run)] if run.source.response else []
    if not run.source.chooses:  # else `pipeline.choice.plans.prepare` looks at the first round
        first = epoch_indices(len(rounds), run.seed, 0, run.rollout.prompts_per_round).tolist()
        refuse_unusable(rounds, first, run, "the first round")
    if evals is not None:
        refuse_unusable(evals, range(min(run.evaluation.problems, len(evals))), evaluation_run(run), "the evaluation")
    notes += [check_references(source, run) for source in (rounds, evals) if source is not None]
    codes = codes_of(run) if codes is None else codes
    notes += check_rewards(run, codes, rounds)
    if evals is not None and run.grade.verdict_reward is not None:
        notes += check_rewards(evaluation_run(run), codes, evals)
    return Sources(rounds, evals, tuple(note for note in notes if note is not None), codes)


def cautions(run: Run, sources: Sources) -> list[str]:
    """What the person who starts the run should know about its sources. It reads every row of a file.

    Raises SourceError when no row of a source can be used.
    """
    pattern = controls(tokenizer_of(run.model))
    training = survey(sources.rounds, pattern, solutions=run.reads_solutions)
    training.check()
    held_out_rows = run.evaluation.source if sources.evals is not None else None
    notes = [*approximation(run.objective, run.score), *sources.rounds.cautions(held_out_rows), *training.notes(), *sources.notes]
    notes += [f"note: {training.uri}: {COSTS}"] if training.rejected and not training.generated else []
    if apart := run.label.differs_from(run.objective, run.profile.window):
        notes.append(f"note: {apart}")
    if sources.evals is not None:
        if (most := run.evaluation.max_new_tokens) != run.rollout.max_new_tokens:
            few = f"{run.rollout.max_new_tokens} tokens in rounds and {most} in evaluations"
            notes.append(f"note: answers have at most {few} (rollout.max_new_tokens, evaluation.max_new_tokens)")
        held_out = survey(sources.evals, pattern, run.evaluation.problems)
        held_out.check()
        notes += [*sources.evals.cautions(), *held_out.notes(), *compared(training, held_out)]
        if run.evaluation.problems < len(sources.evals) and not is_generated(sources.evals):
            asked = f"the first {run.evaluation.problems} of {len(sources.evals)} held-out problems are asked"
            notes.append(f"note: {run.evaluation.source.uri}: {asked} (evaluation.problems)")
    return list(dict.fromkeys(notes))


@contextlib.contextmanager
def until_end(trainer: TrainerHandle, holding: Lease) -> Iterator[TrainerHandle]:
    """Stop the trainer at the end of a block, also when the block fails.

    When another driver has taken the run over, nothing is stopped: the request would reach the trainer of that driver.
    """
    try:
        yield trainer
    finally:
        if not holding.is_lost():
            trainer.stop(END_S)


@dataclass(frozen=True)
class _Measured:
    """A round that the trainer has: when the driver began it (time.perf_counter), and the seconds of its parts."""

    work: Round
    begun: float
    clock: dict[str, float]


@dataclass
class Driver:
    """Brings one run to its end.

    engines: the pool that answers, by stage. Empty when no stage needs engines.
    start_trainer(uri, run): starts a trainer and returns at once. It is called only when a round must still be trained.
    """

    store: Store
    run: Run
    sources: Sources
    engines: Mapping[str, PooledEngines]
    start_trainer: Callable[[str, Run], TrainerHandle]
    screen: Screen

    def __post_init__(self) -> None:
        self._planner = Planner(self.store, self.run, self.sources.rounds)
        self._warned: dict[str, list[int]] = {}  # rounds by kind of warning

    def bring_to_end(self, remaining: Remaining, holding: Lease) -> None:
        """Do everything that remains, in order. Raises StoreError when another driver has taken the run over."""
        with self._training(remaining.train, holding) as trainer:
            if trainer is not None and remaining.train[0] == 0:
                base_model.compare(self.store, self.run, self.engines, partial(self._expect, trainer, 1))
            if remaining.train and self.run.teachers:
                self._wake()
                if trainer is not None and remaining.train[0] == 0:
                    for text in teachers.compare(self.store, self.run, self.engines, partial(self._expect, trainer, 1)):
                        self.screen.say(text)
                with late("teachers", f"teachers and base have answered the sampled problems for {NOTICE_S:g} s so far."):
                    probe_teachers(self.run, self.sources.rounds, self.engines)
                    for text in sample_teachers(self.store, self.run, self.sources.rounds, self.engines):
                        self.screen.say(text)
            if 0 in remaining.evaluate:
                self.evaluate(0, trainer)
            for number in remaining.label:
                withdraw(work := open_round(self.store, self.run, "rounds", number))
                self.label(work)
            add_lost(self.store, self.run)
            if trainer is not None:
                self.train_rounds(trainer, remaining.train, holding)
                with late("trainer end", f"all policies are there. The run has waited {NOTICE_S:g} s for the trainer's end."):
                    trainer.join()
            for version in filter(None, remaining.evaluate):
                self.evaluate(version)

    @contextlib.contextmanager
    def _training(self, numbers: list[int], holding: Lease) -> Iterator[TrainerHandle | None]:
        """A running trainer for the length of a block, or None when no round must be trained."""
        if not numbers:
            yield None
            return
        for file in (base_model.FILE, teachers.FILE):  # of an earlier trainer, perhaps with another model
            self.store.delete(file)
        withdraw_rounds(self.store, numbers)  # an earlier driver committed them; they are committed again when they are fresh
        for number in numbers:  # of traces from before, where policies were deleted or replaced
            self.store.delete_metrics("round", number)
        usage(self.engines)  # it answers once the pools have asked for engines: the first round needs these before a trainer
        with until_end(self.start_trainer(self.store.uri, self.run), holding) as trainer:
            yield trainer

    def train_rounds(self, trainer: TrainerHandle, numbers: list[int], holding: Lease) -> None:
        """Measure one round after the other, at most `max_staleness` rounds ahead of the trainer.

        Policy n - max_staleness answers round n, even when the trainer has published a newer policy by then. The result of a
        run must not depend on who was faster.
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
        for kind, rounds in self._warned.items():
            if len(rounds) > 1:
                self.screen.say(f"{kind} in {among(rounds, 'round')}.")

    def measure(self, number: int) -> _Measured:
        """Bring the measured shards of a round up to date, commit it to the trainer, and label it while the trainer works.

        A pool that shares its card with the trainer has gone to sleep when the round is committed. It is woken here, and for an
        evaluation: the trainer has left the card before it publishes the policy that the driver waits for in between.
        """
        self._wake()
        begun, before = time.perf_counter(), usage(self.engines)
        made = Computed()
        planned = self._planner.plan(number, max(0, number - self.run.max_staleness))
        work = self._filled(replace(planned, codes=self.sources.codes), made)
        left = left_out(work)
        measured, now = time.perf_counter(), usage(self.engines)
        for pool in pools_of(self.engines):
            pool.sleep()
        commit_round(work, left)
        self.label(work, made)
        clock = {"seconds_measure": measured - begun, "seconds_label": time.perf_counter() - measured}
        clock["seconds_engines"] = now.busiest_since(before)
        clock["seconds_engines_idle"] = max(0.0, now.idle_s - before.idle_s)
        return _Measured(work, begun, clock | made.figures(work))

    def _filled(self, work: Round, made: Computed) -> Round:
        """A planned round, measured, with further prompts where groups have no signal (rollout.fill_groups)."""
        source = self.sources.rounds
        while True:
            most = inflight(self.run, self.engines)
            execute(with_engines(work, self.engines), chain_of(self.run, MEASURE), source, inflight=most, on_entry=made.count)
            refuse_wide_bounds(work)
            refuse_nothing_left(work, MEASURE)  # before the trainer takes it: a policy that learned nothing is not published
            longer = self._planner.extended(work)
            if longer is None:
                return work
            work = longer

    def _planned(self, run: Run, kind: str, number: int, version: int, source: ProblemSet) -> Round:
        """A planned round, with the code of the rewards that was checked at the start."""
        return replace(plan_round(self.store, run, kind, number, version, source), codes=self.sources.codes)

    def label(self, work: Round, made: Computed | None = None) -> None:
        """Profile and label a measured round. `made` counts its shards."""
        execute(work, LABELS, on_entry=(made or Computed()).count)

    def evaluate(self, version: int, trainer: TrainerHandle | None = None) -> None:
        """Have policy `version` answer the held-out problems, and grade the answers.

        A `trainer` that works beside it may end meanwhile. Its error is raised at once, and not after the evaluation.
        """
        assert self.sources.evals is not None
        self._wake()
        source = self.sources.evals
        work = self._planned(evaluation_run(self.run), "evals", version, version, source)
        bar = partial(self.screen.bar, f"evaluate policy {version}: steps")
        answer(work, source, self.engines, bar if trainer is None else partial(self._watched, bar, trainer, version + 1))
        refuse_nothing_left(work, EVALUATION)
        teaches = version == 0 and self.run.objective.name in SCALES_ADVANTAGE and not self.run.only_imports
        for text in told(work, teaches):
            self.screen.say(text)

    def _watched(self, bar: Callable[..., Advance], trainer: TrainerHandle, version: int, total: int, done: int = 0) -> Advance:
        """A bar that looks at the trainer, too, whenever it moves. Its step raises as `_expect`."""
        step = bar(total, done)

        def look(note: str = "") -> None:
            """Move the bar, and raise the error that ended the trainer."""
            step(note)
            self._expect(trainer, version)

        return look

    def _wake(self) -> None:
        """Let engines that sleep for the trainer answer again."""
        for pool in pools_of(self.engines):
            pool.wake()

    def _close(self, trainer: TrainerHandle, measured: _Measured) -> str:
        """Wait for the policy that is trained on a round, then write the round's metrics. Returns a note for the bar."""
        number = measured.work.number
        with late("trainer", f"the trainer has worked on policy {number + 1} for {NOTICE_S:g} s: the run waits for it."):
            while not self.store.has_policy(number + 1):
                self._expect(trainer, number + 1)
                time.sleep(self.store.poll_s)
        clock = measured.clock | {"seconds_round": time.perf_counter() - measured.begun}
        summary = summarise_round(measured.work)
        self.store.write_metrics("round", number, [{"round": number, **summary, **clock}])
        if (text := warning(summary, self.run.objective.name in SCALES_ADVANTAGE)) is not None:
            self._warn(number, text)
        return f"accuracy {summary['accuracy']:.2f}  length {summary['mean_length']:.1f}"

    def _warn(self, number: int, text: str) -> None:
        """Show a warning about a round. Further ones of its kind go to the log, and their rounds are told at the end."""
        kind = text.partition(".")[0]
        if kind in self._warned:
            logging.getLogger("egrsd").info("round %d: %s", number, text)
        else:
            self.screen.say(f"round {number}: {text}")
        self._warned.setdefault(kind, []).append(number)

    def _expect(self, trainer: TrainerHandle, version: int) -> None:
        """Raise the error that ended the trainer, or TrainingError, when it ended before it published `version`."""
        if not trainer.running() and not self.store.has_policy(version):
            trainer.join()
            raise TrainingError(f"the trainer ended before it published policy {version}", self.store.uri, "Resume the run")
