"""What remains to be done, as the run directory shows it: for `distill` the rest of the run, for `train` its rounds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import UserError, command
from pipeline.inspection.staleness import among, can_answer, ranges, stale_evaluations
from pipeline.recipes import called
from pipeline.rounds.inventory import POLICY_CHANGED, Inventory
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import Round, evaluation_run, is_of_others, open_rounds, planned
from pipeline.stages import EVALUATION, LABELS, MEASURE, STAGES, chain_of
from pipeline.store.directory import Store

if TYPE_CHECKING:
    from pipeline.config import Run
    from pipeline.problems.sources import ProblemSet


@dataclass(frozen=True)
class Remaining:
    """What a run still needs: rounds to train, rounds to label, and evaluations.

    train, label: numbers of rounds.
    evaluate: the first and the last policy where they lack an evaluation, and policies whose stored evaluation is stale.
    stale: a line for each stage that is stale in trained rounds, and the commands that mend it: `distill` does not.
    """

    train: list[int]
    label: list[int]
    evaluate: list[int]
    stale: list[str]

    @classmethod
    def of(cls, store: Store, run: Run, evals: ProblemSet | None = None) -> Remaining:
        """What the run directory shows. Nothing is changed.

        evals: the open held-out problems. With them, an evaluation of other problems counts as none.
        """
        first, label = store.latest_policy(), []
        stale: dict[tuple[str, str], list[int]] = {}
        for work in itertools.takewhile(lambda work: work.number < first, open_rounds(store, run)):
            inventory = Inventory(work)
            for name in chain_of(run, MEASURE):
                for reason in sorted(inventory.reasons(name)):
                    stale.setdefault((name, reason), []).append(work.number)
            if not inventory.is_fresh(*LABELS) and not _inputs_stale(inventory):
                label.append(work.number)
        held_out = evaluation_run(run) if run.evaluation.problems else None
        versions = [0, run.rounds] if held_out else []
        works = {n: planned(store, held_out, "evals", n) for n in versions if held_out}
        other = [n for n in versions if evals is not None and is_of_others(store, "evals", n, evals)]
        fresh = [n for n, work in works.items() if work is not None and Inventory(work).is_fresh(*chain_of(work.run, EVALUATION))]
        evaluate = {n for n in versions if n in other or n not in fresh}
        evaluate |= {n for n in stale_evaluations(store, run) if can_answer(store, run, n)}
        return cls(list(range(first, run.rounds)), label, sorted(evaluate), _told(store, stale))

    @property
    def is_empty(self) -> bool:
        """Whether the run is complete."""
        return not (self.train or self.label or self.evaluate)

    @property
    def asking(self) -> tuple[str, ...]:
        """The parts that ask engines, by the names of actors.resources.ASKING. An evaluation alone scores nothing."""
        return (("rollout", "score") if self.train else ()) + (("evaluation",) if self.evaluate else ())

    def describe(self, run: Run) -> str:
        """One line about what will happen, for the person who started the run."""
        if len(self.train) == run.rounds:
            return f"{run.rounds} rounds of {called(run)}"
        parts = [f"rounds {self.train[0]} to {run.rounds - 1} to train"] if self.train else []
        parts += [f"{len(self.label)} rounds to label"] if self.label else []
        parts += [f"{len(self.evaluate)} evaluations"] if self.evaluate else []
        return "resuming: " + ", ".join(parts)


def _told(store: Store, stale: dict[tuple[str, str], list[int]]) -> list[str]:
    """A line for each stage and reason, and one with the commands that make stages and policies again."""
    if not stale:
        return []
    lines = [f"stale: {name} of {among(rounds, 'round')} ({reason}), and trained on" for (name, reason), rounds in stale.items()]
    numbers = sorted({number for rounds in stale.values() for number in rounds})
    stages = ",".join(name for name in STAGES if any(name == one for one, _ in stale))
    again = command("stage", stages, "--run", store.uri, "--round", ranges(numbers))
    return [*lines, f"mend: {again}, then {command('train', '--run', store.uri, '--from-round', numbers[0], '--replace')}"]


def _inputs_stale(inventory: Inventory) -> bool:
    """Whether a stage that the labels read is stale, so that `egrsd stage` must run first."""
    graded = chain_of(inventory.work.run, ["grade"])
    return any(inventory.reasons(name) for name in graded) or any(
        inventory.stale_input(STAGES[name], shard) for name in ("grade", "profile") for shard in inventory.work.shards
    )


def trainable_rounds(store: Store, run: Run, first: int) -> list[Round]:
    """Rounds from `first` on that the trainer may take. All of them are measured, and there is no gap between them.

    Raises UserError when there is no such round, or when a stage of one is stale. Raises it also when the training state beside
    policy `first` is no longer kept.
    """
    if not store.has_state(first):
        kept = ", ".join(map(str, [0, *store.numbers("train")]))
        raise UserError(
            f"the training state beside policy {first} is not kept", store.uri, f"Train from one of these rounds: {kept}"
        )
    rounds: list[Round] = []
    for work in itertools.dropwhile(lambda work: work.number < first, open_rounds(store, run)):
        if work.number != first + len(rounds) or not _is_measured(work):
            break
        rounds.append(work)
    if not rounds:
        raise UserError(f"round {first} is not measured", store.uri, f"{command('distill', '--run', store.uri)} makes it")
    return rounds


def _is_measured(work: Round) -> bool:
    """Whether the trainer may take a round. False when no stage is stale and one is missing, or when it is still being filled.

    Raises UserError when a stage is stale, or when the policy that wrote the traces is too far behind.
    """
    inventory, chain = Inventory(work), chain_of(work.run, MEASURE)
    # training reads stored traces, so the policy that wrote them may have been trained again since
    reasons = {name: why for name in chain for why in inventory.reasons(name) if why not in POLICY_CHANGED}
    plan = read_plan(work.store, work.kind, work.number)
    if set(reasons.values()) == {"missing"} or (plan is not None and plan.filling is not None and not plan.filling.full):
        return False
    if work.lag > work.run.max_staleness:
        what = f"was rolled out by policy {work.policy_version}, more than max_staleness {work.run.max_staleness} behind"
        raise UserError(what, work.area, f"It was made under max_staleness {work.lag}: set that value again")
    for name, why in reasons.items():
        raise UserError(
            f"{name} is stale ({why})",
            work.area,
            f"Run {command('stage', name, '--run', work.store.uri, '--round', work.number)} first",
        )
    return True
