"""Figures of every round, from its shards and metrics, and the rows from which a sample of traces is drawn.

A round may lack shards here, and a trace counts as live when no stage up to `score` has rejected it. `rounds.metrics` summarises
whole rounds, before the trainer starts, and counts what `grade` has not rejected. The two agree when `score` rejects nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract import REWARD_PREFIX, Regime, Verdict
from pipeline.report import ledger
from pipeline.report.sampled.room import LINE, asked
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.metrics import is_timed
from pipeline.rounds.rows import of_now, read_shard
from pipeline.stages.tables import ragged

CLOCK = ("seconds_round", "seconds_measure", "seconds_label", "seconds_engines")
EXAMPLES = 3  # rejected rows that are shown for each reason, at most, of a shard


@dataclass(frozen=True, eq=False)
class LabelledTraces:
    """The R labelled traces of a round as its inventory found them.

    Each array is [R]: shard, place in the shard, its prompt's row, and the keys by which a sample is drawn.
    """

    seen: Inventory
    trace_ids: np.ndarray
    shards: np.ndarray
    places: np.ndarray
    prompts: np.ndarray
    verdicts: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True, eq=False)
class Measured:
    """One round in the report."""

    figures: dict[str, Any]
    counts: ledger.Counts
    labelled: LabelledTraces
    rejected: list[dict[str, Any]]


def measure(seen: Inventory, metrics: list[dict[str, Any]]) -> Measured:
    """Figures, counts and rows of a round. `metrics` has all rows of metrics of this round. A missing shard is left out."""
    work = seen.work
    train = [row for row in metrics if row["writer"] == "train"]
    clock = next((row for row in metrics if row["writer"] == "round"), {})
    shards = [_Shard.of(seen, shard) for shard in sorted(work.shards)]
    whole = [shard for shard in shards if shard.measured]
    live = np.concatenate([shard.live for shard in whole]) if whole else np.zeros(0, bool)
    lengths, reward, advantage = (_joined(whole, name) for name in ("lengths", "reward", "advantage"))
    verdicts = np.concatenate([shard.verdicts for shard in whole]) if whole else np.zeros(0, object)
    unused = live & _unused(seen, whole)
    fit = {
        "fit": int(live.sum()),
        "fit_tokens": int(lengths[live].sum()),
        "no_advantage": int((advantage[live & ~unused] == 0).sum()),
        "unused": int(unused.sum()),
        "unused_tokens": int(lengths[unused].sum()),
    }
    figures = {
        "round": work.number,
        "policy": work.policy_version,
        "lag": work.lag,
        "complete": len(whole) == len(shards),
        "traces": len(live),
        "verdicts": {str(v): int((verdicts == v).sum()) for v in Verdict},
        "accuracy": _mean(verdicts[live] == Verdict.CORRECT),
        "reward": _mean(reward[live]),
        "length": _mean(lengths[live]),
        "truncated": _mean(verdicts[live] == Verdict.TRUNCATED),
        "groups": clock.get("num_groups"),
        "groups_without_signal": clock.get("num_groups_without_signal"),
        "rewards": {key.removeprefix(REWARD_PREFIX): value for key, value in clock.items() if key.startswith(REWARD_PREFIX)},
        **_token_figures(whole),
        **_train_figures(train),
        "engine_tokens_per_s": _rate(lengths.sum(), clock["seconds_measure"]) if is_timed(clock) else None,
        "stages": {key[14:]: value for key, value in clock.items() if key.startswith("seconds_stage_")},
        **{name: clock.get(name) for name in CLOCK},
        "seconds_engines_idle": clock.get("seconds_engines_idle", _idle(clock)),
    }
    first = {stage: sum((shard.first.get(stage, Counter()) for shard in shards), Counter()) for stage in _GRADED}
    counts = ledger.count_round(seen, fit | {"rejected": first, "complete": len(whole) == len(shards)}, train)
    return Measured(figures, counts, _labelled(seen, shards), [r for s in shards for r in s.rejected])


@dataclass(frozen=True, eq=False)
class _Shard:
    """The columns of one shard that the report needs. Arrays are empty when a stage is missing."""

    name: str
    measured: bool
    labelled: bool
    trace_ids: np.ndarray
    prompts: np.ndarray
    live: np.ndarray
    lengths: np.ndarray
    verdicts: np.ndarray
    reward: np.ndarray
    advantage: np.ndarray
    delta: np.ndarray
    gaps: np.ndarray
    student: np.ndarray
    entropy: np.ndarray
    shares: np.ndarray
    rejected: list[dict[str, Any]]
    first: dict[str, Counter[str]] = field(default_factory=dict)  # rejected rows by the stage that rejected them first
    unread: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # traces of writers that training does not read

    @classmethod
    def of(cls, seen: Inventory, name: str) -> _Shard:
        """One shard of a round, with the stages that it has."""
        entries = of_now({stage: entry for stage in _COLUMNS if (entry := seen.entry(stage, name)) is not None})
        tables = read_shard(seen.work.store, entries, _COLUMNS)
        none, text = np.zeros(0), np.zeros(0, object)
        if not {"rollout", "grade", "score"} <= tables.keys():
            whole, no = none.astype(int), none.astype(bool)
            first = {"rollout": Counter(entries["rollout"].rejected)} if "rollout" in entries else {}
            return cls(name, False, False, text, whole, no, whole, text, none, none, none, none, none, none, none, [], first)
        rollout, grade, score = (tables[stage] for stage in _GRADED)
        reasons = pc.coalesce(*(table["reject_reason"] for table in (rollout, grade, score)))
        first, sources = _rejected_first(tables), seen.work.run.objective.sources
        live = np.asarray(pc.is_null(reasons))
        profile = tables.get("profile")
        kept = score.filter(pa.array(live))  # a rejected row may have log-probs of one side alone
        deltas = np.abs(ragged(kept["teacher_logprobs"])[0] - ragged(kept["student_logprobs"])[0])
        return cls(
            name,
            True,
            "label" in tables and profile is not None,
            np.array(rollout["trace_id"].to_pylist(), object),
            rollout["prompt_index"].to_numpy(),
            live,
            pc.fill_null(pc.list_value_length(rollout["response_tokens"]), 0).to_numpy(),
            np.array(grade["verdict"].to_pylist(), object),
            _floats(grade["reward"]),
            _floats(grade["advantage"]),
            deltas,
            _floats(pc.drop_null(score["student_logprob_gap"])),
            ragged(rollout.filter(pa.array(live))["rollout_entropy"])[0],
            _floats(profile["entropy_mean"]) if profile is not None else none,
            np.stack([_floats(profile[f"share_{n}"]) for n in Regime.NAMES], 1) if profile is not None else none,
            _examples(seen, name, rollout, reasons, pc.coalesce(*(t["reject_detail"] for t in (rollout, grade, score)))),
            first,
            np.array([source not in sources for source in rollout["trace_source"].to_pylist()], bool),
        )


def _rejected_first(tables: dict[str, pa.Table]) -> dict[str, Counter[str]]:
    """Rejected rows of a shard by stage and reason. A row that two stages reject counts once, under the first of them."""
    found: dict[str, Counter[str]] = {}
    met = np.zeros(tables["rollout"].num_rows, bool)
    for stage in _GRADED:
        reasons = np.array(tables[stage]["reject_reason"].to_pylist(), object)
        is_rejected = np.array([reason is not None for reason in reasons], bool)
        found[stage] = Counter(reasons[is_rejected & ~met])
        met |= is_rejected
    return found


_GRADED = ("rollout", "grade", "score")
_REASONS = ["reject_reason", "reject_detail"]
_COLUMNS = {
    "rollout": ["trace_id", "prompt_index", "trace_source", *_REASONS, "response_tokens", "rollout_entropy"],
    "grade": [*_REASONS, "verdict", "reward", "advantage"],
    "score": [*_REASONS, "teacher_logprobs", "student_logprobs", "student_logprob_gap"],
    "profile": ["entropy_mean", *(f"share_{name}" for name in Regime.NAMES)],
    "label": ["trace_id"],
}


def _unused(seen: Inventory, shards: list[_Shard]) -> np.ndarray:
    """Traces that the trainer does not take, bool [traces of the shards].

    A filled round leaves groups out, and an objective may not learn from what some writers wrote.
    """
    ready = seen.work.store.ready(seen.work.number)
    left = {} if ready is None else ready.left_out
    parts = [np.zeros(0, bool)]
    for shard in shards:
        prompts = len(seen.work.shards[shard.name])
        groups = np.isin(np.arange(prompts), left.get(shard.name, []))
        parts.append(np.repeat(groups, len(shard.live) // prompts) | shard.unread)
    return np.concatenate(parts)


def _token_figures(shards: list[_Shard]) -> dict[str, Any]:
    """Means over tokens: teacher entropy in nats and regime shares of labelled shards; of all shards |delta| and the entropy of
    the writer (the student, but for traces of a teacher), both in nats."""
    known = [shard for shard in shards if shard.labelled]
    tokens = np.concatenate([np.where(shard.live, shard.lengths, 0) for shard in known]) if known else np.zeros(0)
    size = max(float(tokens.sum()), 1.0)
    delta = np.concatenate([shard.delta for shard in shards]) if shards else np.zeros(0)
    gaps = np.concatenate([shard.gaps for shard in shards]) if shards else np.zeros(0)
    return {
        "entropy": float(np.nansum(np.concatenate([s.entropy for s in known]) * tokens) / size) if known else None,
        "shares": (np.nansum(np.concatenate([s.shares for s in known]) * tokens[:, None], 0) / size).tolist() if known else None,
        "delta": _mean(delta),
        "student_entropy": _mean(np.concatenate([shard.student for shard in shards])) if shards else None,
        "rescore_gap": float(gaps.max()) if len(gaps) else None,
    }


def _train_figures(train: list[dict[str, Any]]) -> dict[str, Any]:
    first = train[0] if train else {}
    return {
        "steps": len(train),
        "loss": _mean(np.array([row["loss"] for row in train])) if train else None,
        "grad_norm": _mean(np.array([row["grad_norm"] for row in train if "grad_norm" in row])),
        "train_tokens_per_s": _rate(sum(row.get("tokens", 0) for row in train), sum(row.get("seconds", 0.0) for row in train)),
        "trainer_gap": first.get("logprob_gap"),
        "trainer_gap_max": first.get("logprob_gap_max"),
        "seconds_train": sum(row.get("seconds", 0.0) for row in train) if train else None,
    }


def _rate(tokens: float, seconds: float | None) -> float | None:
    """Tokens in a second. None where no time was measured."""
    return float(tokens) / seconds if seconds else None


def _idle(clock: dict[str, Any]) -> float | None:
    """Idle seconds of the busiest engine in a round. Older runs, which did not measure idle time, are shown with this."""
    whole, busy = clock.get("seconds_round"), clock.get("seconds_engines")
    return None if whole is None or busy is None else max(0.0, whole - busy)


def _labelled(seen: Inventory, shards: list[_Shard]) -> LabelledTraces:
    known = [shard for shard in shards if shard.labelled]
    keep = [np.flatnonzero(shard.live & (shard.lengths > 0)) for shard in known]

    def joined(values: list[np.ndarray], kind: Any) -> np.ndarray:
        """The shards' arrays as one."""
        return np.concatenate(values) if values else np.zeros(0, kind)

    return LabelledTraces(
        seen,
        joined([shard.trace_ids[rows] for shard, rows in zip(known, keep, strict=True)], object),
        joined([np.full(len(rows), shard.name, object) for shard, rows in zip(known, keep, strict=True)], object),
        joined(keep, int),
        joined([shard.prompts[rows] for shard, rows in zip(known, keep, strict=True)], int),
        joined([shard.verdicts[rows] for shard, rows in zip(known, keep, strict=True)], object),
        joined([shard.lengths[rows] for shard, rows in zip(known, keep, strict=True)], int),
    )


def _examples(seen: Inventory, shard: str, rollout: pa.Table, reasons: Any, details: Any) -> list[dict[str, Any]]:
    """The first rejected rows of a shard, at most EXAMPLES for each reason: row of the source, problem, and how many traces."""
    examples: list[dict[str, Any]] = []
    known: dict[tuple[str, int], dict[str, Any]] = {}
    for place, (reason, detail) in enumerate(zip(reasons.to_pylist(), details.to_pylist(), strict=True)):
        if reason is None:
            continue
        trace, prompt = (rollout[name][place].as_py() for name in ("trace_id", "prompt_index"))
        if (reason, prompt) in known:
            known[reason, prompt]["traces"] += 1
        elif sum(name == reason for name, _ in known) < EXAMPLES:
            known[reason, prompt] = {"trace": trace, "traces": 1, "reason": reason, "detail": detail or "", "prompt": prompt}
            examples.append(known[reason, prompt])
    if examples:
        entries = {"prompts": entry} if (entry := seen.entry("prompts", shard)) is not None else {}
        problems = read_shard(seen.work.store, entries, {"prompts": ["problem", "messages"]}).get("prompts")
        rows = problems.to_pylist() if problems is not None else []
        for example in examples:
            prompt = example.pop("prompt")
            example |= {"round": seen.work.number, "row": seen.work.run.source.row_of(seen.work.shards[shard][prompt])}
            example["problem"] = asked(rows[prompt])[:LINE] if rows else ""
    return examples


def _joined(shards: list[_Shard], name: str) -> np.ndarray:
    return np.concatenate([getattr(shard, name) for shard in shards]) if shards else np.zeros(0)


def _floats(column: Any) -> np.ndarray:
    """A numeric column as float64 [R]. Null becomes NaN."""
    return column.cast(pa.float64()).to_numpy()


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
