"""The ledger: a count of all rows from the source to the loss, with equations that show whether any row is lost.

    planned prompts = prompts;  prompts x G = traces;  traces - rejected, by reason = fit to train on;
    fit - groups that are not trained on - left out by the trainer = traces in the loss;  their tokens = tokens in the loss

The two sides of an equation come from different places: plan, manifest entries, rows of shards, the trainer's metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc

from pipeline.rounds.inventory import Inventory
from pipeline.stages import MEASURE, STAGES
from pipeline.store.directory import Entry


@dataclass
class Counts:
    """Counts of one round, or the sums of several rounds.

    rejected: rows by stage and reason; a row that two stages reject counts under the first.
    unused, unused_tokens: of traces that are fit, but whose groups a filled round leaves out (rollout.fill_groups), or whose
    writers the objective may not learn from.
    complete: all shards up to `score` are there. trained: the trainer has reported metrics. current: no shard was computed again
    since the round was committed to the trainer. Only then can the stored rows be compared with those that were trained on.
    """

    planned: int = 0
    prompts: int = 0
    prompts_rejected: Counter[str] = field(default_factory=Counter)
    expected: int = 0
    traces: int = 0
    rejected: dict[str, Counter[str]] = field(default_factory=dict)
    fit: int = 0
    fit_tokens: int = 0
    no_advantage: int = 0
    unused: int = 0
    unused_tokens: int = 0
    left_out: int = 0
    in_loss: int = 0
    tokens_in_loss: int = 0
    complete: bool = True
    trained: bool = True
    current: bool = True


def count_round(seen: Inventory, rows: dict[str, Any], train: list[dict[str, Any]]) -> Counts:
    """Counts of a round. `rows`: the fields that are counted in its shards. `train`: the trainer's metrics of it.

    A round that lacks a shard is not complete, and the rows of that shard are not counted.
    """
    work = seen.work
    entries = {name: list(seen.entries(name).values()) for name in MEASURE}
    counts = Counts(
        planned=sum(map(len, work.shards.values())),
        prompts=_rows(entries["prompts"]),
        prompts_rejected=seen.rejected("prompts"),
        expected=sum(entry.rows * _asked(seen, entry.shard) for entry in entries["prompts"]),
        traces=_rows(entries["rollout"]),
        trained=bool(train),
        current=seen.as_committed is not False,
        **rows,
    )
    if train:
        counts.left_out = int(train[-1].get("rejected", 0))
        counts.in_loss = int(sum(row.get("traces", 0) for row in train))
        counts.tokens_in_loss = int(sum(row.get("tokens", 0) for row in train))
    return counts


def total(parts: Iterable[Counts]) -> Counts:
    """The sums over all rounds. They are complete, or trained, only when every round is."""
    whole = Counts()
    for part in parts:
        for name in _SUMMED:
            setattr(whole, name, getattr(whole, name) + getattr(part, name))
        for stage, reasons in part.rejected.items():
            whole.rejected[stage] = whole.rejected.get(stage, Counter()) + reasons
        whole.complete &= part.complete
        whole.trained &= part.trained
        whole.current &= part.current
    return whole


def checks(counts: Counts) -> list[dict[str, Any]]:
    """The equations: what each says, both sides, and whether they are equal. `ok` is None while that cannot be known."""
    rejected = sum(sum(reasons.values()) for reasons in counts.rejected.values())
    unused = " − not trained on" if counts.unused else ""
    equations = [
        ("prompts planned = prompts stored", counts.planned, counts.prompts, True),
        ("prompts × traces per prompt = traces stored", counts.expected, counts.traces, counts.complete),
        ("traces − rejected = fit to train on", counts.traces - rejected, counts.fit, counts.complete),
        (
            f"fit{unused} − left out by the trainer = in the loss",
            counts.fit - counts.unused - counts.left_out,
            counts.in_loss,
            counts.trained and counts.current,
        ),
    ]
    if not counts.left_out:  # the trainer does not report the tokens of traces that it leaves out
        equations.append(
            (
                f"tokens fit to train on{unused} = tokens in the loss",
                counts.fit_tokens - counts.unused_tokens,
                counts.tokens_in_loss,
                counts.trained and counts.current,
            )
        )
    return [
        {"what": what, "left": left, "right": right, "ok": left == right if known else None}
        for what, left, right, known in equations
    ]


def document(counts: Counts) -> dict[str, Any]:
    """Counts and checks as plain JSON. `num_rejected` is the number of traces that are not fit to train on."""
    plain = {name: getattr(counts, name) for name in (*_SUMMED, "complete", "trained", "current")}
    plain["prompts_rejected"] = dict(counts.prompts_rejected)
    plain["num_prompts_rejected"] = sum(counts.prompts_rejected.values())
    plain["num_rejected"] = counts.traces - counts.fit
    plain["rejected"] = {stage: dict(reasons) for stage, reasons in counts.rejected.items() if reasons}
    return plain | {"checks": checks(counts)}


_SUMMED = (
    "planned",
    "prompts",
    "prompts_rejected",
    "expected",
    "traces",
    "fit",
    "fit_tokens",
    "no_advantage",
    "unused",
    "unused_tokens",
    "left_out",
    "in_loss",
    "tokens_in_loss",
)


def _asked(seen: Inventory, shard: str) -> int:
    """Traces of each prompt of a shard. Traces that were made with earlier settings tell it by their numbers in the group."""
    entry = seen.entry("rollout", shard)
    if entry is None or entry.settings == seen.settings(STAGES["rollout"]):
        return seen.work.run.rollout.group_size
    last = pc.max(seen.work.store.read(entry, ["sample_index"])["sample_index"]).as_py()
    return entry.rows // max(1, len(seen.work.shards[shard])) if last is None else last + 1  # None: no prompt could be asked


def _rows(entries: list[Entry]) -> int:
    return sum(entry.rows for entry in entries)
