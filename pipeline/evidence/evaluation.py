"""What policies answered, and the figures of it, each with its interval.

Every figure is computed from `Samples`, N problems x K samples, in which NaN stands for a rejected row. A bootstrap draws
problems. A difference pairs by problem: both sides take the same draws.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Run
from pipeline.contract import Verdict
from pipeline.evidence.intervals import RESAMPLES, Estimate, estimate, resampled
from pipeline.problems.answers import normal_form
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import Round, evaluation_run, open_round
from pipeline.store.directory import Store

FIGURES = ("avg", "pass", "maj", "length", "median_length", "truncated", "tokens_per_correct")
MEANS = ("avg", "length")  # those that `egrsd distill` and the report show


@dataclass(frozen=True, eq=False)
class Samples:
    """What one policy answered: N problems x K samples, NaN where a row was rejected.

    correct and truncated [N, K] in {0, 1}; length [N, K] tokens; majority [N] in [0, 1], see the function `majority`; verdicts
    are counts by verdict, rejected are counts of rows by reason.
    """

    correct: np.ndarray
    truncated: np.ndarray
    length: np.ndarray
    majority: np.ndarray
    verdicts: dict[str, int]
    rejected: dict[str, int]

    def __len__(self) -> int:
        return len(self.correct)


def samples(tables: list[tuple[pa.Table, pa.Table]], size: int) -> Samples:
    """From the (rollout, grade) shards of an evaluation in order, `size` rows per problem next to each other."""
    grade = pa.concat_tables([g.select(["reject_reason", "verdict", "extracted_answer"]) for _, g in tables])
    lengths = pa.concat_tables([r.select(["response_tokens"]) for r, _ in tables])["response_tokens"]
    live = np.array(pc.is_null(grade["reject_reason"]))
    verdict = np.array(grade["verdict"].to_pylist(), object)

    def shaped(values: np.ndarray) -> np.ndarray:
        """One row per problem, NaN where rejected."""
        return np.where(live, values, np.nan).reshape(-1, size)

    answers = np.array(grade["extracted_answer"].to_pylist(), object).reshape(-1, size)
    correct = shaped((verdict == Verdict.CORRECT).astype(float))
    return Samples(
        correct,
        shaped((verdict == Verdict.TRUNCATED).astype(float)),
        shaped(pc.fill_null(pc.list_value_length(lengths), 0).to_numpy().astype(float)),
        np.array([majority(right, given) for right, given in zip(correct, answers, strict=True)]),
        dict(Counter(v for v in verdict if v is not None)),
        dict(Counter(pc.drop_null(grade["reject_reason"]).to_pylist())),
    )


def read(work: Round) -> Samples:
    """What was answered in an evaluation of which every shard is there, in the order of its problems.

    Raises ValueError where its shards hold different numbers of samples a problem.
    """
    seen = Inventory(work)
    rollouts, grades = seen.entries("rollout"), seen.entries("grade")
    tables = [(work.store.read(rollouts[shard]), work.store.read(grades[shard])) for shard in sorted(work.shards)]
    [size] = _sample_counts(seen)
    return samples(tables, int(size))


def held_out(store: Store, run: Run, version: int) -> Samples | None:
    """What a policy answered on the run's own held-out problems.

    None where that evaluation is not there, only in part, or half done anew with another number of samples a problem.
    """
    if read_plan(store, "evals", version) is None:
        return None
    seen = Inventory(open_round(store, evaluation_run(run), "evals", version))
    whole = seen.is_whole("rollout", "grade") and len(_sample_counts(seen)) == 1
    return read(seen.work) if whole else None


def _sample_counts(seen: Inventory) -> set[float]:
    """The different numbers of samples a problem among an evaluation's shards."""
    return {entry.rows / len(seen.work.shards[shard]) for shard, entry in seen.entries("rollout").items()}


def engine_facts(work: Round) -> dict[str, Any]:
    """What the engines of an evaluation's rollouts were; several, with commas, where it was resumed on others."""
    entries = Inventory(work).entries("rollout").values()
    names = ("engine", "dtype", "logprobs_mode", "entropy_method")
    return {name: ", ".join(sorted({str(entry.facts[name]) for entry in entries})) for name in names}


def majority(correct: np.ndarray, answers: np.ndarray) -> float:
    """Whether the commonest answer of one problem is right: 1, 0, or 1/m where the right one ties with m - 1 others.

    correct [K] in {0, 1} or NaN, answers [K] text or None. All right answers count as one, however they are written. Wrong
    answers differ where their normal forms differ. A sample without an answer (truncated, unparsable) has no vote. Without any
    vote the result is 0, and without any row it is NaN.
    """
    if not np.isfinite(correct).any():
        return math.nan
    votes: Counter[Any] = Counter()
    for right, answer in zip(correct, answers, strict=True):
        if right == 1 or (right == 0 and answer is not None):
            votes[True if right == 1 else normal_form(answer)] += 1
    most = max(votes.values(), default=0)
    first = [answer for answer, count in votes.items() if count == most]
    return 1 / len(first) if True in first else 0.0


def pass_at(correct: np.ndarray, k: int) -> np.ndarray:
    """Chance that one of k samples is right, unbiased: 1 - C(n - c, k) / C(n, k) (2107.03374) -> [N].

    correct [N, n] in {0, 1}, or NaN for a rejected row, which is no sample. The result is NaN where fewer than k are left.
    """
    left = np.isfinite(correct).sum(1)
    wrong = left - np.nansum(correct, axis=1).astype(int)
    chances = [1 - math.comb(int(w), k) / math.comb(int(n), k) if n >= k else math.nan for n, w in zip(left, wrong, strict=True)]
    return np.array(chances)


def figures(found: Samples, k: int, seed: int = 0, names: tuple[str, ...] = FIGURES) -> dict[str, Estimate]:
    """Figures, by name, with their 95 % percentile bootstrap intervals over the problems that were answered; see `draws`.

    A figure that fewer than two problems tell is left out, such as pass@k where rejected rows leave fewer than k samples.
    Raises ValueError when fewer than two problems were answered.
    """
    found = _select(found, _answered(found))
    rows = resampled(len(found), seed)
    return _estimates({name: draws(found, name, k, rows) for name in names})


def differences(after: Samples, before: Samples, k: int, seed: int = 0, names: tuple[str, ...] = FIGURES) -> dict[str, Estimate]:
    """`after` - `before` in each figure, paired by problem, over the problems that both answered.

    A figure whose interval is not bounded, for want of correct answers, is left out. Raises ValueError when the two are not of
    the same problems, or both answered fewer than two.
    """
    if len(after) != len(before):
        raise ValueError(f"{len(after)} and {len(before)} problems do not pair")
    both = _answered(after) & _answered(before)
    rows = resampled(int(both.sum()), seed)
    after, before = _select(after, both), _select(before, both)
    with np.errstate(invalid="ignore"):  # without a correct answer on either side tokens per correct answer have no difference
        return _estimates({name: draws(after, name, k, rows) - draws(before, name, k, rows) for name in names}, bounded=True)


def macro(of_sources: list[tuple[Samples, Samples | None]], k: int) -> dict[str, Estimate]:
    """Mean over sources of each figure, or of its difference to a second policy; every source draws its own problems."""
    total: dict[str, np.ndarray] = {name: np.zeros(RESAMPLES + 1) for name in FIGURES}
    for number, (found, other) in enumerate(of_sources):
        told = _answered(found) & (_answered(other) if other is not None else True)
        found, other = _select(found, told), _select(other, told) if other is not None else None
        rows = resampled(len(found), number)
        for name in FIGURES:
            with np.errstate(invalid="ignore"):
                part = draws(found, name, k, rows) - (draws(other, name, k, rows) if other is not None else 0.0)
                total[name] = total[name] + part / len(of_sources)
    return _estimates(total, bounded=any(other is not None for _, other in of_sources))


def comparable(after: Samples, before: Samples) -> bool:
    """Whether both are of the same problems and both answered at least two of them: `differences` needs that."""
    return len(after) == len(before) and int((_answered(after) & _answered(before)).sum()) > 1


def draws(found: Samples, name: str, k: int, rows: np.ndarray) -> np.ndarray:
    """The figure `name` on each choice of problems, `rows` [R, N] -> [R].

    avg: share of correct samples; pass: `pass_at` k; maj: `majority` of all samples; length and truncated: means over samples;
    median_length: over all samples; tokens_per_correct: all tokens, of wrong answers too, per correct answer (infinite without
    one). Means are over problems, so that a rejected row does not make its problem count less.
    """
    with np.errstate(all="ignore"):
        if name == "median_length":
            return np.array([np.nanmedian(found.length[chosen]) for chosen in rows])
        if name == "tokens_per_correct":
            tokens, right = _row_mean(found.length), _row_mean(found.correct)
            return np.nansum(tokens[rows], axis=1) / np.nansum(right[rows], axis=1)
        values = {
            "avg": lambda: _row_mean(found.correct),
            "pass": lambda: pass_at(found.correct, k),
            "maj": lambda: found.majority,
            "length": lambda: _row_mean(found.length),
            "truncated": lambda: _row_mean(found.truncated),
        }[name]()
        return _mean(values[rows])


def per_problem(found: Samples, name: str) -> np.ndarray:
    """Means over the samples of each problem [N] of `correct`, `length` or `truncated`; NaN where all were rejected."""
    return _row_mean(getattr(found, name))


def _estimates(drawn: dict[str, np.ndarray], bounded: bool = False) -> dict[str, Estimate]:
    """Estimates of the figures that have one."""
    estimates = {name: estimate(values, bounded) for name, values in drawn.items()}
    return {name: found for name, found in estimates.items() if found is not None}


def _answered(found: Samples) -> np.ndarray:
    """Problems [N] with a sample that was not rejected."""
    return np.isfinite(found.correct).any(1)


def _select(found: Samples, rows: np.ndarray) -> Samples:
    parts = {name: getattr(found, name)[rows] for name in ("correct", "truncated", "length", "majority")}
    return replace(found, **parts)


def _row_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the samples of each problem [N, K] -> [N]; NaN without one."""
    count = np.isfinite(values).sum(1)
    return np.where(count, np.nansum(values, axis=1) / np.maximum(count, 1), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without the NaN ones; NaN where there is nothing else."""
    count = np.isfinite(values).sum(-1)
    return np.nansum(values, axis=-1) / np.where(count, count, np.nan)
