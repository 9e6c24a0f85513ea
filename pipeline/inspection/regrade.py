"""Which stored verdicts the grader of now would change. Nothing is written, and no engine is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from pipeline.grader.verifier import Grader
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round
from pipeline.rounds.rows import read_shard
from pipeline.store.directory import Entry


class Change(NamedTuple):
    """One trace whose verdict would change. `old` and `new` are a verdict, or `rejected: reason`."""

    prompt_id: str
    gold: str
    response: str
    old: str
    new: str


class Regraded(NamedTuple):
    """One shard that was graded again: how many rows it has, and what would change.

    stale: whether it was left out, because its traces were made again since it was graded.
    """

    rows: int
    changes: list[Change]
    stale: bool = False


def regrade(work: Round, grader: Grader) -> Iterator[Regraded]:
    """Grade every stored shard of a round again, and compare. Rows that were rejected before grading are left out.

    Raises StoreError when a shard is damaged, or when its stages do not hold the same rows.
    """
    seen = Inventory(work)
    stages = {name: seen.entries(name) for name in ("prompts", "rollout", "grade")}
    for shard in sorted(set.intersection(*(set(entries) for entries in stages.values()))):
        here = {name: entries[shard] for name, entries in stages.items()}
        if not _follows(here):
            yield Regraded(0, [], stale=True)
            continue
        tables = read_shard(work.store, here)
        asked, rollout, grade = (tables[name] for name in stages)
        live = [row for row, reason in enumerate(rollout["reject_reason"].to_pylist()) if reason is None]
        chosen = pa.array(live, pa.int64())  # of a list without a row Arrow knows no type
        traces, stored = rollout.take(chosen), grade.take(chosen)
        asked = asked.take(traces["prompt_index"])
        responses, golds = traces["response_text"].to_pylist(), asked["answer"].to_pylist()
        results = grader.grade(responses, golds, traces["finish_reason"].to_pylist())
        old = [_said(*pair) for pair in zip(stored["verdict"].to_pylist(), stored["reject_reason"].to_pylist(), strict=True)]
        new = [_said(result.verdict, result.reject) for result in results]
        rows = zip(asked["prompt_id"].to_pylist(), golds, responses, old, new, strict=True)
        yield Regraded(len(live), [Change(*row) for row in rows if row[3] != row[4]])


def _follows(here: dict[str, Entry]) -> bool:
    """Whether each stage of a shard was made from the present ones before it."""
    return all(here[name].sha256 == made for entry in here.values() for name, made in entry.inputs.items() if name in here)


def _said(verdict: str | None, reject: str | None) -> str:
    return f"rejected: {reject}" if reject is not None else str(verdict)
