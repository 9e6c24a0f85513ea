"""A run, to be read in a notebook or a script: rounds, traces, figures, policies and evaluations, as Arrow tables.

    from pipeline import open_run

    run = open_run("runs/demo")
    run.figures.to_pandas().plot("round", "accuracy")
    run.rounds[3].traces(["verdict", "reward", "response_text"]).to_pandas()

Nothing is written, and neither Ray, vLLM nor torch is loaded. Files are checked as every command checks them: a damaged one
raises StoreError, which names it. pipeline/README.md has every column.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config import Run
from pipeline.errors import UserError
from pipeline.evidence.evaluation import FIGURES, Samples, figures, held_out
from pipeline.evidence.intervals import Estimate
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import Round, evaluation_run, open_round
from pipeline.rounds.rows import joined_round
from pipeline.store.directory import Store, area


def open_run(uri: str | Path) -> OpenRun:
    """The run at a local path or a URI. Raises UserError when there is none, and StoreError when run.json is damaged."""
    store = Store(str(uri))
    return OpenRun(store, store.load_run())


@dataclass(frozen=True)
class OpenRun:
    """A run. It shows the files as they are when they are read, so that a live run can be looked at again and again."""

    store: Store
    settings: Run

    @property
    def rounds(self) -> Numbered:
        """The rounds that are planned, by number: `run.rounds[3]`, `run.rounds.last`, or a loop over all."""
        return Numbered(self, "rounds", self._planned("rounds"))

    @property
    def evaluations(self) -> Numbered:
        """The evaluations on the run's own held-out problems, by the number of the policy: `run.evaluations[16]`."""
        return Numbered(self, "evals", self._planned("evals"))

    @property
    def policies(self) -> list[SeenPolicy]:
        """The published policies in order. The base is policy 0 and has no folder."""
        numbers = [number for number in self.store.numbers("policy") if self.store.has_policy(number)]
        return [SeenPolicy(0, None), *(SeenPolicy(n, self.store.locate(area("policy", n))) for n in numbers)]

    @property
    def figures(self) -> pa.Table:
        """One row for each round, with its metrics: accuracy, mean_reward, mean_length, shares, seconds. Ordered by `round`."""
        return self._metrics("round")

    @property
    def steps(self) -> pa.Table:
        """One row for each optimiser step, with the trainer's metrics: loss, grad_norm, lr. Ordered by `round` and `step`."""
        return self._metrics("train")

    def _metrics(self, writer: str) -> pa.Table:
        rows = [{k: v for k, v in row.items() if k != "writer"} for row in self.store.metrics() if row["writer"] == writer]
        names = list(dict.fromkeys(name for row in rows for name in row))
        first = [name for name in ("round", "step") if name in names]
        columns = {name: [row.get(name) for row in rows] for name in [*first, *(n for n in names if n not in first)]}
        return pa.table({name: _column(values) for name, values in columns.items()})

    def _planned(self, kind: str) -> list[int]:
        return [number for number in self.store.numbers(kind) if read_plan(self.store, kind, number) is not None]


def _column(values: list[Any]) -> pa.Array:
    """Whole numbers stay whole; a column with one fraction is of floats."""
    fraction = any(isinstance(value, float) for value in values)
    return pa.array(values, pa.float64() if fraction else None)


@dataclass(frozen=True)
class SeenPolicy:
    """A published policy. `uri` is the folder of its adapter in peft format, None for the base."""

    version: int
    uri: str | None


class Numbered(Mapping[int, "OpenRound"]):
    """Rounds or evaluations of a run by number. Raises UserError, with the numbers that are there, for another one."""

    def __init__(self, run: OpenRun, kind: str, numbers: list[int]) -> None:
        self._run, self._kind, self._numbers = run, kind, numbers

    def __getitem__(self, number: int) -> OpenRound:
        if number not in self._numbers:
            here = ", ".join(map(str, self._numbers)) or "none"
            raise UserError(f"{self._kind} has no {number}", self._run.store.uri, f"Here: {here}")
        settings = self._run.settings if self._kind == "rounds" else evaluation_run(self._run.settings)
        return OpenRound(self._run, open_round(self._run.store, settings, self._kind, number))

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __repr__(self) -> str:
        return f"{self._kind}: {', '.join(map(str, self._numbers)) or 'none'}"

    @property
    def last(self) -> OpenRound:
        """The one with the highest number. Raises UserError when there is none."""
        return self[max(self._numbers, default=0)]


@dataclass(frozen=True)
class OpenRound:
    """A round, or the evaluation of a policy."""

    run: OpenRun
    work: Round

    @property
    def number(self) -> int:
        """Number of the round, or of the policy that was evaluated."""
        return self.work.number

    @property
    def policy(self) -> int:
        """Version of the policy that answered."""
        return self.work.policy_version

    def traces(self, columns: Collection[str] | None = None) -> pa.Table:
        """All traces, one per row, with `round`, the columns of the prompt, and those of every stage; or the `columns` alone.

        A rejected row keeps its `reject_reason`. Token columns are lists [T] in nats. `.to_pandas()` makes a data frame. Raises
        UserError for an unknown column, or while the traces are not all there.
        """
        if not Inventory(self.work).is_whole("prompts", "rollout"):
            raise UserError(f"{self.work.area} has not all its traces yet", self.run.store.uri, "Read an earlier one, or wait")
        return joined_round(self.work, columns)

    @cached_property
    def figures(self) -> dict[str, Any]:
        """Metrics of a round by name, as in `OpenRun.figures`. Of an evaluation: figures with 95 % intervals (`Estimate`).

        Empty while they are not written.
        """
        if self.work.kind == "rounds":
            rows = self.run.store.metrics()
            found = next((row for row in rows if row["writer"] == "round" and row["round"] == self.number), {})
            return {name: value for name, value in found.items() if name != "writer"}
        samples = self.samples
        return dict(_estimates(samples)) if samples is not None else {}

    @property
    def samples(self) -> Samples | None:
        """Of an evaluation: correctness and length of N problems x K samples. None for a round, or while it is not complete."""
        return held_out(self.run.store, self.run.settings, self.number) if self.work.kind == "evals" else None


def _estimates(samples: Samples) -> dict[str, Estimate]:
    return figures(samples, samples.correct.shape[1], names=FIGURES)
