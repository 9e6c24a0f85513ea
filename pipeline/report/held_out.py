"""The held-out problems of a run: figures of each policy with intervals, and what each policy answered, problem by problem."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import Run
from pipeline.errors import StoreError, command
from pipeline.evidence.documents import plain
from pipeline.evidence.evaluation import (
    MEANS,
    Samples,
    comparable,
    differences,
    figures,
    held_out,
    per_problem,
    same_evaluation,
    sampling,
)
from pipeline.inspection.staleness import among
from pipeline.problems.sources import named
from pipeline.report.sampled.blocks import pack
from pipeline.report.sampled.room import LINE, asked, room
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import evaluation_run, open_round
from pipeline.rounds.rows import read_shard
from pipeline.store.directory import Store, area

MOST_PROBLEMS = 4_000  # of one run, in the order of its evaluation
BLOCK_PROBLEMS = 256
_COLUMNS = {
    "prompts": ["problem", "messages", "answer"],
    "rollout": ["response_text", "response_tokens", "prompt_index"],
    "grade": ["verdict", "extracted_answer"],
}


@dataclass(frozen=True, eq=False)
class Evaluations:
    """The evaluations of a run on its held-out problems, by policy: those with the problems and settings of the last one.

    left_out: policies whose evaluation had others.
    """

    store: Store
    run: Run
    samples: dict[int, Samples]
    left_out: tuple[int, ...] = ()

    @classmethod
    def of(cls, store: Store, run: Run) -> Evaluations:
        """Those that are complete. An evaluation with other problems or settings than the last one stands beside no others."""
        found = {version: held_out(store, run, version) for version in store.numbers("evals")}
        whole = {version: answered for version, answered in found.items() if answered is not None}
        alike = {v: s for v, s in whole.items() if same_evaluation(s, whole[max(whole)])}
        return cls(store, run, alike, tuple(whole.keys() - alike.keys()))

    @property
    def last(self) -> Samples | None:
        """The samples of the last policy that was evaluated."""
        return self.samples[max(self.samples)] if self.samples else None

    def notes(self) -> list[str]:
        """A sentence on evaluations that are left out, if there are some."""
        whose = among(self.left_out, "policy", "policies")
        what = "its problems or settings were not those of the last evaluation"
        return [f"What {whose} answered is left out: {what}."] if self.left_out else []

    def figures(self) -> list[dict[str, Any]]:
        """Accuracy and length of each policy with intervals, where two problems at least were answered."""
        shown = []
        for version, answered in self.samples.items():
            with contextlib.suppress(ValueError):
                values = figures(answered, 1, names=MEANS)
                means = {"accuracy": plain(values["avg"]), "length": plain(values["length"])}
                source = "earlier settings" if answered.earlier else named(self.run.evaluation.source)
                asked = {"source": source, "sampling": sampling(answered, self.run)}
                cut = {"truncated": float(np.nanmean(answered.truncated))}
                shown.append({"policy": version, "problems": len(answered), **means, **asked, **cut})
        return shown

    def change(self) -> dict[str, Any] | None:
        """The last policy against the first, paired by problem. None without two evaluations that pair."""
        first, last = min(self.samples, default=0), max(self.samples, default=0)
        return None if first == last else between(self.samples[last], self.samples[first])

    def answers(self, limit: int) -> dict[str, Any] | None:
        """What each policy answered, in blocks of problems, with an index. None without an evaluation.

        limit: bytes of all texts. Texts are cut to fit, and problems beyond MOST_PROBLEMS are left out.
        """
        if not self.samples:
            return None
        keys = [f"{key}#{count}" for key, count in self.samples[max(self.samples)].keys][:MOST_PROBLEMS]
        texts: dict[str, dict[str, Any]] = {}
        said: dict[int, dict[str, Any]] = {}
        for version, samples in self.samples.items():
            order = [f"{key}#{count}" for key, count in samples.keys]
            asked_, answered = _answers(self.store, self.run, version)
            if len(answered) != len(order):
                what = f"has {len(answered)} problems, and its samples are of {len(order)}"
                remedy = f"{command('verify', '--run', self.store.uri)} names the damaged file"
                raise StoreError(what, area("evals", version), remedy)
            texts |= dict(zip(order, asked_, strict=True))
            said[version] = dict(zip(order, answered, strict=True))
        whole = [texts[key] | {"answers": [said[version][key] for version in said]} for key in keys]
        _cut(whole, limit)
        starts = range(0, len(keys), BLOCK_PROBLEMS)
        return {
            "policies": list(said),
            "keys": keys,
            "problems": [row["problem"][:LINE] for row in whole],
            "correct": [plain(_of(self.samples[version], "correct", keys), 4) for version in said],
            "truncated": [plain(_of(self.samples[version], "truncated", keys), 4) for version in said],
            "length": [plain([round(mean, 1) for mean in _of(self.samples[version], "length", keys)]) for version in said],
            "blocks": [pack({"problems": whole[start : start + BLOCK_PROBLEMS]}, ()) for start in starts],
            "block": BLOCK_PROBLEMS,
            "all": len(self.samples[max(self.samples)]),
        }


def between(after: Samples, before: Samples) -> dict[str, Any] | None:
    """`after` - `before` in accuracy and length with intervals, paired by problem. None when they do not pair.

    better, worse: problems with a larger, or smaller, share of correct samples.
    """
    if not comparable(after, before):
        return None
    values = differences(after, before, 1, names=MEANS)
    places = {key: place for place, key in enumerate(before.keys)}
    order = np.array([places[key] for key in after.keys])
    moved = per_problem(after, "correct") - per_problem(before, "correct")[order]
    return {
        "accuracy": plain(values.get("avg")),
        "length": plain(values.get("length")),
        "better": int((moved > 0).sum()),
        "worse": int((moved < 0).sum()),
        "problems": int(np.isfinite(moved).sum()),
    }


def _of(samples: Samples, name: str, keys: list[str]) -> list[float]:
    """The means of problems in the order of their keys, NaN where all samples were rejected."""
    values = dict(zip((f"{key}#{count}" for key, count in samples.keys), per_problem(samples, name).tolist(), strict=True))
    return [values[key] for key in keys]


def _answers(store: Store, run: Run, version: int) -> tuple[list[dict[str, str]], list[list[dict[str, Any]]]]:
    """The problems of an evaluation in order, and what its policy answered to each: [N], and [N] lists of K samples."""
    seen = Inventory(open_round(store, evaluation_run(run), "evals", version))
    problems: list[dict[str, str]] = []
    answers: list[list[dict[str, Any]]] = []
    for shard in sorted(seen.work.shards):
        entries = {name: entry for name in _COLUMNS if (entry := seen.entry(name, shard)) is not None}
        tables = read_shard(store, entries, _COLUMNS)
        prompts, rollout, grade = (tables[name].to_pylist() if name in tables else [] for name in _COLUMNS)
        size = len(seen.work.shards[shard])
        prompts = prompts or [{"problem": None, "answer": None}] * size
        rows: list[list[dict[str, Any]]] = [[] for _ in range(size)]
        for place, (written, graded) in enumerate(zip(rollout, grade, strict=True)):
            one = {"verdict": graded["verdict"], "length": len(written["response_tokens"] or ())}
            texts = {"text": written["response_text"] or "", "extracted": graded["extracted_answer"] or ""}
            rows[place * size // len(rollout)].append(one | texts)
        problems += [{"problem": asked(prompt), "answer": prompt["answer"] or ""} for prompt in prompts]
        answers += rows
    return problems, answers


def _cut(rows: list[dict[str, Any]], limit: int) -> None:
    """Cut texts so that all of them fit."""
    named_ = [(row, ("problem", "answer")) for row in rows]
    named_ += [(one, ("text", "extracted")) for row in rows for answers in row["answers"] for one in answers]
    most = room([holder[name] for holder, names in named_ for name in names], limit)
    for holder, names in named_:
        holder |= {name: holder[name][:most] for name in names}
