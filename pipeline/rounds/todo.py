"""What is to do, read off the run directory: what `distill` still lacks, and which rounds `train` may take."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import Round, evaluation_run, open_round, open_rounds
from pipeline.stages import EVALUATION, LABELS, MEASURE, STAGES
from pipeline.store.directory import Store, area
from pipeline.store.folders import MANIFEST

if TYPE_CHECKING:
    from pipeline.config import Run


@dataclass(frozen=True)
class Missing:
    """What a run still lacks: rounds to train, rounds to label, evaluations (of policy 0 and of the last).

    `stale` says what trained rounds were trained on and has changed since: that is for `egrsd stage` and `egrsd train`.
    """

    train: list[int]
    label: list[int]
    evaluate: list[int]
    stale: list[str]

    @classmethod
    def of(cls, store: Store, run: Run) -> Missing:
        """Read it off the run directory."""
        first, stale, label = store.latest_policy(), [], []
        for work in itertools.takewhile(lambda work: work.number < first, open_rounds(store, run)):
            seen = Inventory(work)
            stale += [
                f"stale: {work.area} {name} ({reason}), trained on all the same; `egrsd stage` and `egrsd train` redo it"
                for name in MEASURE
                for reason in sorted(seen.reasons(name))
            ]
            if not seen.is_fresh(*LABELS) and not _inputs_stale(seen):
                label.append(work.number)
        held_out = evaluation_run(run) if run.evaluation.problems else None
        versions = [0, run.rounds] if held_out else []
        planned = {n: _planned(store, held_out, "evals", n) for n in versions if held_out}
        evaluate = [n for n, work in planned.items() if work is None or not Inventory(work).is_fresh(*EVALUATION)]
        return cls(list(range(first, run.rounds)), label, evaluate, stale)

    @property
    def nothing(self) -> bool:
        """Whether the run is complete."""
        return not (self.train or self.label or self.evaluate)

    @property
    def on_engines(self) -> bool:
        """Whether engines are needed."""
        return bool(self.train or self.evaluate)

    def text(self, run: Run) -> str:
        """What will happen, for the person who started it."""
        if len(self.train) == run.rounds:
            return f"{run.rounds} rounds of recipe {run.name}"
        parts = [f"rounds {self.train[0]} to {run.rounds - 1} to train"] if self.train else []
        parts += [f"{len(self.label)} rounds to label"] if self.label else []
        parts += [f"{len(self.evaluate)} evaluations"] if self.evaluate else []
        return "resuming: " + ", ".join(parts)


def _planned(store: Store, run: Run, kind: str, number: int) -> Round | None:
    """The round, if its plan has as many prompts as are asked for now; else None."""
    plan = read_plan(store, kind, number)
    return open_round(store, run, kind, number) if plan and plan.asked in (None, run.rollout.prompts_per_round) else None


def _inputs_stale(seen: Inventory) -> bool:
    """Whether labels cannot be made before `egrsd stage` has redone what they read."""
    return bool(seen.reasons("grade")) or any(
        seen.stale_input(STAGES[name], shard) for name in ("grade", "profile") for shard in seen.work.shards
    )


def trainable(store: Store, run: Run, first: int) -> list[Round]:
    """Rounds from `first` on that can be trained on: measured, without a gap.

    Raises UserError when there is none, when a stage of one is stale, or when the training state that stood beside policy `first`
    is no longer kept.
    """
    if first and store.read_bytes(f"{area('train', first)}/{MANIFEST}") is None:
        kept = ", ".join(map(str, [0, *store.numbers("train")]))
        raise UserError(
            f"the training state beside policy {first} is not kept", store.uri, f"Train from one of these rounds: {kept}"
        )
    found: list[Round] = []
    for work in itertools.dropwhile(lambda work: work.number < first, open_rounds(store, run)):
        if work.number != first + len(found) or not _is_measured(work):
            break
        found.append(work)
    if not found:
        raise UserError(f"round {first} is not measured", store.uri, "`egrsd status` shows which are; `egrsd distill` makes them")
    return found


def _is_measured(work: Round) -> bool:
    """Whether the trainer may take a round; False where nothing is there. Raises UserError where a part is stale or too old."""
    seen = Inventory(work)
    # the policy that wrote a trace may have been trained again since: stored traces are what this trains on
    reasons = {name: why for name in MEASURE for why in seen.reasons(name) if why != "policy changed"}
    if set(reasons.values()) == {"missing"}:
        return False
    if work.lag > work.run.max_staleness:
        what = f"was rolled out by policy {work.policy_version}, more than max_staleness {work.run.max_staleness} behind"
        raise UserError(what, work.area, f"It was made under max_staleness {work.lag}: allow that again")
    for name, why in reasons.items():
        raise UserError(f"{name} is stale ({why})", work.area, f"Run `egrsd stage {name} --round {work.number}` first")
    return True
