"""The labelled traces of a round, group by group, with every token's signals and what both models saw."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Label
from pipeline.contract import REWARD_PREFIX, TOPK, Regime
from pipeline.evidence.documents import read_alignment
from pipeline.method import regimes
from pipeline.report.figures import LabelledTraces
from pipeline.report.sampled.groups import partings
from pipeline.report.sampled.room import LINE, MOST_TEXT, asked
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.rows import of_now, read_shard
from pipeline.stages.tables import matrices, ragged, views

ALTERNATIVES = 5  # likeliest tokens of the teacher that are shown of a position, where they were kept
STORED = {
    "entropy": ("score", "teacher_entropy"),
    "ahead": ("profile", "lookahead_entropy"),
    "student": ("score", "student_logprobs"),
    "teacher": ("score", "teacher_logprobs"),
    "gate": ("label", "gate"),
    "weight": ("label", "token_weight"),
}
SIGNALS = (*STORED, "delta", "magnitude", "restored")


def groups_of_round(rows: LabelledTraces, chosen: np.ndarray) -> Iterator[dict[str, Any]]:
    """The groups of the chosen rows of one round, shard by shard."""
    alignment = read_alignment(rows.seen.work.store, rows.seen.work.number, rows.seen.measured)
    for shard in np.unique(rows.shards[chosen].astype(str)):
        mine = chosen[rows.shards[chosen] == shard]
        yield from _of_shard(rows.seen, str(shard), rows.places[mine], alignment)


def of_labels(seen: Inventory) -> dict[str, Any]:
    """What a reader must know of the labels of a round: the M of Eq. 5 that they are shown with, and whether they are stale."""
    peak, reasons = seen.scope.peak if seen.scope else 0.0, seen.reasons("label")
    del reasons["missing"]
    run = seen.work.run
    stale = (
        f"The labels of this round are stale ({', '.join(sorted(reasons))}). Regime, gate and weight are as stored. "
        "Magnitude, restored weight and M are computed with the settings of now."
    )
    apart = run.label.differs_from(run.objective, run.profile.window)
    notes = [stale] if reasons else []
    notes += [f"{apart[0].upper()}{apart[1:]}."] if apart else []
    return {"normaliser": float(regimes.normaliser(peak, run.label)), "note": " ".join(notes) or None}


def _of_shard(seen: Inventory, shard: str, places: np.ndarray, alignment: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """The groups of some rows of a shard, in their order. alignment: of each audited trace, by its id."""
    work, peak = seen.work, seen.scope.peak if seen.scope else 0.0
    columns = _columns(work.run.grade.rewards)
    entries = of_now({name: entry for name in columns if (entry := seen.entry(name, shard)) is not None})
    tables = read_shard(work.store, entries, columns)
    siblings = pa.table({"prompt": tables["rollout"]["prompt_index"], **{n: tables["grade"][n] for n in ("verdict", "reward")}})
    siblings = siblings.filter(pc.is_valid(siblings["reward"]))
    tables = {name: table.take(places) if name != "prompts" else table for name, table in tables.items()}
    signals, facts = _signals(tables, peak, work.run.label), _facts(tables)
    score, ids, regime = tables["score"], views(tables["rollout"]["response_tokens"]), views(tables["label"]["regime"])
    contexts = views(score["teacher_context_tokens"]) if "teacher_context_tokens" in score.column_names else [None] * len(places)
    taught, kept, prompts = _taught(score), _alternatives(score), tables["prompts"]
    traces = []
    for row, (context, fact) in enumerate(zip(contexts, facts, strict=True)):
        of_token = {name: values[row] for name, values in signals.items()}
        arrays = {"ids": ids[row], "regime": regime[row], "signals": of_token, "context": context}
        fact["facts"] |= {"length": len(ids[row]), "restored_sum": _rounded(float(of_token["restored"].sum()))}
        fact["facts"]["update"] = _rounded(float(np.abs(of_token["weight"]).sum()))
        aligned = alignment.get(fact["facts"]["id"])
        arrays["alignment"] = aligned if aligned is not None and len(aligned) == len(ids[row]) else None
        traces.append(fact | arrays | {"taught": taught[row], "alternatives": kept[row]})
    indices = tables["rollout"]["prompt_index"].to_pylist()
    for index, members in groupby(zip(indices, traces, strict=True), lambda pair: pair[0]):
        group = siblings.filter(pc.equal(siblings["prompt"], index))
        yield _group(work.number, prompts.slice(index, 1), [trace for _, trace in members], group)


def _facts(tables: dict[str, pa.Table]) -> list[dict[str, Any]]:
    """`facts` for the index, and texts, of each trace."""
    found = []
    rows = zip(
        tables["rollout"].drop_columns(["response_tokens"]).to_pylist(),
        tables["grade"].to_pylist(),
        tables["profile"]["entropy_mean"].to_pylist(),
        tables["label"]["spans"].to_pylist(),
        tables["reward"].to_pylist() if "reward" in tables else [{}] * tables["grade"].num_rows,
        strict=True,
    )
    for written, graded, mean, spans, rewards in rows:
        facts = {
            "id": written["trace_id"],
            "policy": written["policy_version"],
            "source": written["trace_source"],
            "sample": written["sample_index"],
            "finish": written["finish_reason"],
            "verdict": graded["verdict"],
            "reward": _rounded(graded["reward"]),
            "advantage": _rounded(graded["advantage"]),
            "pivots": sum(span["regime"] == Regime.PIVOT for span in spans),
            "forks": sum(span["regime"] == Regime.FORK for span in spans),
            "mean": _rounded(mean),
        }
        texts = {"text": written["response_text"][:MOST_TEXT], "extracted": (graded["extracted_answer"] or "")[:MOST_TEXT]}
        single = {name.removeprefix(REWARD_PREFIX): _rounded(value) for name, value in sorted(rewards.items())}
        found.append({"facts": facts, **texts, "rewards": single})
    return found


def _rounded(value: float | None) -> float | None:
    """Five significant digits, which the page shows three of."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.5g}")


def _group(number: int, prompt: pa.Table, traces: list[dict[str, Any]], siblings: pa.Table) -> dict[str, Any]:
    """One group: its prompt, those of its traces that the page shows, and where these part ways.

    siblings: verdict and reward of all its traces that are not rejected.
    """
    row, rewards = prompt.to_pylist()[0], siblings["reward"].to_numpy()
    common, apart = partings([trace["ids"] for trace in traces])
    for trace, first in zip(traces, apart, strict=True):
        trace["facts"]["apart"] = first
    problem = asked(row)[:MOST_TEXT]
    facts = {
        "round": number,
        "problem": problem[:LINE],
        "of": siblings.num_rows,
        "correct": siblings["verdict"].to_pylist().count("correct"),
        "common": common,
        "reward": _rounded(float(np.mean(rewards))),
        "spread": _rounded(float(np.std(rewards))),
    }
    prompts = {name: views(prompt[f"{name}_tokens"])[0] for name in ("prompt", "teacher_prompt")}
    texts = {name: (row[name] or "")[:MOST_TEXT] for name in ("answer", "solution")}
    return {"facts": facts, "problem": problem, **texts, **prompts, "traces": traces}


TEACHER = ["teacher_name", "teacher_context", "teacher_sibling"]


_COLUMNS = {
    "prompts": ["problem", "messages", "answer", "solution", "prompt_tokens", "teacher_prompt_tokens"],
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
    "grade": ["verdict", "extracted_answer", "reward", "advantage"],
    "score": ["teacher_entropy", "student_logprobs", "teacher_logprobs", "teacher_context_tokens", *TOPK, *TEACHER],
    "profile": ["lookahead_entropy", "entropy_mean"],
    "label": ["regime", "spans", "gate", "token_weight"],
}


def _columns(rewards: Any) -> dict[str, list[str]]:
    """The columns of each stage that the page shows, with those of the run's own rewards."""
    return _COLUMNS | ({"reward": [f"{REWARD_PREFIX}{reward.name}" for reward in rewards]} if rewards else {})


def _taught(score: pa.Table) -> list[str]:
    """A sentence on the teacher of each trace. Empty in a run that names none."""
    if not set(TEACHER) <= set(score.column_names):
        return [""] * score.num_rows
    rows = score.select(TEACHER).to_pylist()
    said = {"plain": "with the problem alone", "privileged": "with the reference", "feedback": "with the verdict on it"}
    siblings = [f"with the correct trace {row['teacher_sibling']}" for row in rows]
    seen = [said.get(row["teacher_context"], sibling) for row, sibling in zip(rows, siblings, strict=True)]
    return [f"Scored by teacher {row['teacher_name']}, {what} in view." for row, what in zip(rows, seen, strict=True)]


def _alternatives(score: pa.Table) -> list[dict[str, np.ndarray] | None]:
    """The teacher's likeliest tokens of every position, for each trace: ids and probabilities [T, K], at most ALTERNATIVES.

    None where a shard keeps none.
    """
    if not set(TOPK) <= set(score.column_names):
        return [None] * score.num_rows
    pairs = zip(*(matrices(score[name]) for name in TOPK), strict=True)
    return [{"tokens": ids[:, :ALTERNATIVES], "probs": np.exp(logprobs[:, :ALTERNATIVES])} for ids, logprobs in pairs]


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
