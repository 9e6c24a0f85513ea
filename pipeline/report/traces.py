"""A sample of labelled traces with every token's signals, small enough for one page.

The sample is even over strata (round and verdict), so that it contains rare verdicts. It is drawn in the order of trace ids. They
are hashes, so the same run gives the same sample. The page holds numbers as little-endian half floats in base64. Half precision
keeps three digits at any size. Fixed-point numbers would lose the 0.002 nat of a token of regime lock.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import Label
from pipeline.contract import TOPK, Regime
from pipeline.method import regimes
from pipeline.report.figures import LabelledTraces
from pipeline.report.page import embedded
from pipeline.report.tokens import pieces
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.rows import read_shard
from pipeline.stages.tables import matrices, ragged, views

MOST_TRACES, MOST_TOKENS = 1500, 300_000
MOST_TEXT = 20_000  # characters of a problem, a solution or a plain response; fewer when all texts exceed MOST_BYTES
MOST_BYTES = 8_000_000  # of all texts together, as they are stored in the page
ALTERNATIVES = 5  # likeliest tokens of the teacher that are shown of a position, where they were kept
MOST_ALTERNATIVES = 750_000  # of all positions together, of 8 bytes each; of a large sample fewer are shown of each position
TEXTS = ("problem", "answer", "solution", "text")
STORED = {
    "entropy": ("score", "teacher_entropy"),
    "ahead": ("profile", "lookahead_entropy"),
    "student": ("score", "student_logprobs"),
    "teacher": ("score", "teacher_logprobs"),
    "gate": ("label", "gate"),
    "weight": ("label", "token_weight"),
}


def choose(
    strata: np.ndarray, keys: np.ndarray, lengths: np.ndarray, most_traces: int = MOST_TRACES, most_tokens: int = MOST_TOKENS
) -> np.ndarray:
    """Rows of a sample, int64 [S], ascending: from each stratum in turn the trace with the least key, while both limits hold.

    strata [R] of any type, keys [R] unique, lengths [R] in tokens. A trace that exceeds the limit of tokens is left out, except
    the first one.
    """
    if not len(keys):
        return np.zeros(0, np.int64)
    codes = np.unique(strata, return_inverse=True)[1]
    by_key = np.lexsort((keys, codes))
    counts = np.bincount(codes)
    rank = np.empty(len(keys), np.int64)
    rank[by_key] = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    taken: list[int] = []
    left = most_tokens
    for row in np.lexsort((keys, rank)).tolist():
        if len(taken) == most_traces:
            break
        if lengths[row] <= left or not taken:
            taken.append(row)
            left -= int(lengths[row])
    return np.sort(np.array(taken))


def sample(measured: list[LabelledTraces], tokenizer: Any) -> dict[str, Any]:
    """The sampled traces of all rounds, the vocabulary that they use, and the counts behind the sample, as plain JSON."""
    owner = np.repeat(np.arange(len(measured)), [len(rows.trace_ids) for rows in measured])
    ids, verdicts, lengths = (
        np.concatenate([getattr(rows, name) for rows in measured]) for name in ("trace_ids", "verdicts", "lengths")
    )
    strata = np.array([f"{k} {verdict}" for k, verdict in zip(owner, verdicts, strict=True)], str)
    chosen = choose(strata, ids.astype(str), lengths)
    starts = np.searchsorted(owner, np.arange(len(measured)))
    found = [t for k, rows in enumerate(measured) for t in _of_round(rows, chosen[owner[chosen] == k] - starts[k])]
    shown = min(ALTERNATIVES, max(1, MOST_ALTERNATIVES // max(1, int(lengths[chosen].sum()))))
    kept = [_pack_alternatives(trace["alternatives"], shown) for trace in found if trace["alternatives"]]
    used = np.unique(np.concatenate([trace["tokens"] for trace in found] + kept)) if found else np.zeros(0, np.int32)
    vocabulary = pieces(tokenizer, used.tolist())
    most_text = _room([trace[name] for trace in found for name in TEXTS])
    for trace in found:
        trace |= {name: trace[name][:most_text] for name in TEXTS}
        for holder in filter(None, (trace, trace["alternatives"])):
            holder["tokens"] = _packed(np.searchsorted(used, holder["tokens"]), "<u4")
    return {
        "traces": found,
        "vocabulary": [piece.text for piece in vocabulary],
        "kinds": "".join(piece.kind[0] for piece in vocabulary),  # t text, s special, b bytes
        "most_text": most_text,
        "labelled": len(ids),
        "labelled_tokens": int(lengths.sum()),
        "shown_tokens": int(lengths[chosen].sum()),
        "strata": len(np.unique(strata)),
    }


def _room(texts: list[str]) -> int:
    """Characters that each text may keep so that all texts fit into MOST_BYTES."""
    most = MOST_TEXT
    while most > 100 and sum(len(embedded(text[:most])) for text in texts) > MOST_BYTES:
        most //= 2
    return most


def _of_round(rows: LabelledTraces, chosen: np.ndarray) -> Iterator[dict[str, Any]]:
    """The chosen rows of one round, shard by shard."""
    note = _note(rows.seen)
    for shard in np.unique(rows.shards[chosen].astype(str)):
        mine = chosen[rows.shards[chosen] == shard]
        for trace in _of_shard(rows.seen, str(shard), rows.places[mine]):
            yield trace | {"note": " ".join(filter(None, (trace.pop("taught"), note))) or None}


def _note(seen: Inventory) -> str | None:
    """What a reader must know about a round whose labels are stale. None when they are fresh."""
    reasons = seen.reasons("label")
    del reasons["missing"]
    if not reasons:
        return None
    return (
        f"The labels of this round are stale ({', '.join(sorted(reasons))}). Regime, gate and weight are as stored. "
        "Magnitude, restored weight and M are computed with the settings of now."
    )


def _of_shard(seen: Inventory, shard: str, places: np.ndarray) -> Iterator[dict[str, Any]]:
    work, peak = seen.work, seen.scope.peak if seen.scope else 0.0
    entries = {name: entry for name in _COLUMNS if (entry := seen.entry(name, shard)) is not None}
    tables = read_shard(work.store, entries, _COLUMNS)
    tables = {name: table.take(places) if name != "prompts" else table for name, table in tables.items()}
    prompts = tables["prompts"].take(tables["rollout"]["prompt_index"])
    signals = _signals(tables, peak, work.run.label)
    tokens, codes = views(tables["rollout"]["response_tokens"]), views(tables["label"]["regime"])
    means, kept = tables["profile"]["entropy_mean"].to_pylist(), _alternatives(tables["score"])
    rollout, grade, taught = tables["rollout"].to_pylist(), tables["grade"].to_pylist(), _taught(tables["score"])
    for row, (text, written, graded) in enumerate(zip(prompts.to_pylist(), rollout, grade, strict=True)):
        mine = {name: views[row] for name, views in signals.items()}
        spans = tables["label"]["spans"][row].as_py()
        yield {
            "id": written["trace_id"],
            "round": work.number,
            "policy": written["policy_version"],
            "source": written["trace_source"],
            "sample": written["sample_index"],
            "finish": written["finish_reason"],
            "verdict": graded["verdict"],
            "reward": graded["reward"],
            "advantage": graded["advantage"],
            "length": len(tokens[row]),
            "pivots": sum(span["regime"] == Regime.PIVOT for span in spans),
            "forks": sum(span["regime"] == Regime.FORK for span in spans),
            "restored_sum": float(mine["restored"].sum()),
            "normaliser": float(regimes.normaliser(peak, work.run.label)),
            "mean": means[row],
            **{name: (text[name] or "")[:MOST_TEXT] for name in ("answer", "solution")},
            "problem": _asked(text)[:MOST_TEXT],
            "text": written["response_text"][:MOST_TEXT],
            "tokens": tokens[row],
            "alternatives": kept[row] if kept else None,
            "taught": taught[row] if taught else "",
            "regime": _packed(codes[row], "u1"),
            **{name: _packed(values, "<f2") for name, values in mine.items()},
        }


TEACHER = ["teacher_name", "teacher_context", "teacher_sibling"]


def _asked(prompt: dict[str, Any]) -> str:
    """The text of a problem, or all turns of its conversation with their roles."""
    if not prompt.get("messages"):
        return prompt["problem"] or ""
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in json.loads(prompt["messages"]))


_COLUMNS = {
    "prompts": ["problem", "messages", "answer", "solution"],
    "rollout": [
        "trace_id",
        "prompt_index",
        "sample_index",
        "trace_source",
        "response_tokens",
        "response_text",
        "finish_reason",
        "policy_version",
    ],
    "grade": ["verdict", "reward", "advantage"],
    "score": ["teacher_entropy", "student_logprobs", "teacher_logprobs", *TOPK, *TEACHER],
    "profile": ["lookahead_entropy", "entropy_mean"],
    "label": ["regime", "spans", "gate", "token_weight"],
}


def _taught(score: pa.Table) -> list[str]:
    """A sentence on the teacher of each trace. Empty in a run that names none."""
    if not set(TEACHER) <= set(score.column_names):
        return []
    rows = score.select(TEACHER).to_pylist()
    said = {"plain": "with the problem alone", "privileged": "with the reference", "feedback": "with the verdict on it"}
    siblings = [f"with the correct trace {row['teacher_sibling']}" for row in rows]
    seen = [said.get(row["teacher_context"], sibling) for row, sibling in zip(rows, siblings, strict=True)]
    return [f"Scored by teacher {row['teacher_name']}, {what} in view." for row, what in zip(rows, seen, strict=True)]


def _alternatives(score: pa.Table) -> list[dict[str, Any]]:
    """The teacher's likeliest tokens of every position, for each trace: ids and log-probs [T, K], at most ALTERNATIVES.

    Empty where a shard keeps none.
    """
    if not set(TOPK) <= set(score.column_names):
        return []
    pairs = zip(*(matrices(score[name]) for name in TOPK), strict=True)
    return [{"tokens": ids[:, :ALTERNATIVES], "logprobs": logprobs[:, :ALTERNATIVES]} for ids, logprobs in pairs]


def _pack_alternatives(trace: dict[str, Any], most: int) -> np.ndarray:
    """Keep at most `most` alternatives of each position of a trace, with the log-probs as half floats. Returns the ids, flat."""
    tokens, logprobs = (trace[name][:, :most] for name in ("tokens", "logprobs"))
    trace |= {"count": tokens.shape[1], "tokens": tokens, "logprobs": _packed(logprobs, "<f2")}
    return np.ravel(tokens)


def _signals(tables: dict[str, pa.Table], peak: float, settings: Label) -> dict[str, list[np.ndarray]]:
    """Every signal of a token that the page shows, by name, a view [T] for each trace.

    The columns of STORED, and three signals that no stage writes: delta = log p_T - log p_S in nats, the magnitude of Eq. 2, and
    restored = omega(H^CL) - omega(H) with M of the round, as in the label stage.
    """
    found = {name: ragged(tables[stage][column])[0] for name, (stage, column) in STORED.items()}
    offsets = ragged(tables["score"]["teacher_entropy"])[1]
    advantage = tables["grade"]["advantage"].to_numpy()
    largest = regimes.normaliser(peak, settings)
    now, ahead = (regimes.gate(found[name], largest, settings) for name in ("entropy", "ahead"))
    found["delta"] = found["teacher"] - found["student"]
    found["magnitude"] = regimes.magnitude(found["teacher"], found["student"], offsets, advantage, settings.epsilon)
    found["restored"] = ahead - now
    return {name: [values[a:b] for a, b in pairwise(offsets.tolist())] for name, values in found.items()}


def _packed(values: np.ndarray, kind: str) -> str:
    if kind == "<f2":
        values = np.clip(values, -65504, 65504)
    return base64.b64encode(values.astype(kind).tobytes()).decode()
