"""What evaluations say and how much to believe it: figures with bootstrap intervals, paired differences, runs over seeds.

Everything is computed from `Samples`, N problems x K samples; NaN stands where a row was rejected. Arrays are over problems, a
bootstrap draws problems, and a difference pairs by problem: the same draws go to both sides.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract import Verdict
from pipeline.problems.answers import normal_form
from pipeline.rounds.metrics import Estimate

RESAMPLES = 2000
FIGURES = ("avg", "pass", "maj", "length", "median_length", "truncated", "tokens_per_correct")


@dataclass(frozen=True, eq=False)
class Samples:
    """What one policy answered: N problems x K samples, NaN where a row was rejected.

    correct and truncated [N, K] in {0, 1}, length [N, K] tokens; majority [N] in [0, 1], whether the commonest answer is
    right (see `majority`); verdicts by count; rejected rows by reason.
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


def majority(correct: np.ndarray, answers: np.ndarray) -> float:
    """Whether the commonest answer of one problem is right: 1, 0, or 1/m where the right one ties with m - 1 others.

    NaN without rows.

    correct [K] in {0, 1} or NaN, answers [K] text or None. Right answers are one, however they are written; wrong ones are told
    apart by their normal form. A sample without an answer (truncated, unparsable) has no vote; with no vote at all the answer
    is 0.
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

    correct [N, n] in {0, 1}, or NaN for a rejected row, which is no sample; NaN where fewer than k are left.
    """
    left = np.isfinite(correct).sum(1)
    wrong = left - np.nansum(correct, axis=1).astype(int)
    chances = [1 - math.comb(int(w), k) / math.comb(int(n), k) if n >= k else math.nan for n, w in zip(left, wrong, strict=True)]
    return np.array(chances)


def figures(found: Samples, k: int, seed: int = 0) -> dict[str, Estimate]:
    """FIGURES with their 95 % percentile bootstrap intervals over the problems that were answered; see `draws`.

    Left out is what fewer than two problems tell (pass@k, when rejected rows leave fewer than k samples). Raises ValueError when
    fewer than two were answered.
    """
    found = _select(found, _answered(found))
    picks = _picks(len(found), seed)
    return _estimates({name: draws(found, name, k, picks) for name in FIGURES})


def differences(after: Samples, before: Samples, k: int, seed: int = 0) -> dict[str, Estimate]:
    """`after` - `before` in each of FIGURES, paired by problem: over the problems that both answered. One whose interval is not
    bounded, for want of correct answers, is left out.

    Raises ValueError when they are not of the same problems.
    """
    if len(after) != len(before):
        raise ValueError(f"{len(after)} and {len(before)} problems do not pair")
    both = _answered(after) & _answered(before)
    picks = _picks(int(both.sum()), seed)
    after, before = _select(after, both), _select(before, both)
    with np.errstate(invalid="ignore"):  # without a correct answer on either side tokens per correct answer have no difference
        return _estimates({name: draws(after, name, k, picks) - draws(before, name, k, picks) for name in FIGURES}, bounded=True)


def macro(of_sources: list[tuple[Samples, Samples | None]], k: int) -> dict[str, Estimate]:
    """Mean over sources of each figure, or (with a second one to pair with) of its difference; sources are resampled apart."""
    total: dict[str, np.ndarray] = {name: np.zeros(RESAMPLES + 1) for name in FIGURES}
    for number, (found, other) in enumerate(of_sources):
        rows = _answered(found) & (_answered(other) if other is not None else True)
        found, other = _select(found, rows), _select(other, rows) if other is not None else None
        picks = _picks(len(found), number)
        for name in FIGURES:
            with np.errstate(invalid="ignore"):
                part = draws(found, name, k, picks) - (draws(other, name, k, picks) if other is not None else 0.0)
                total[name] = total[name] + part / len(of_sources)
    return _estimates(total, bounded=any(other is not None for _, other in of_sources))


def draws(found: Samples, name: str, k: int, picks: np.ndarray) -> np.ndarray:
    """The figure `name` on the problems as they are (first) and on every resample `picks` [R, N] -> [1 + R].

    avg: share of correct samples; pass: `pass_at` k; maj: `majority` of all samples; length and truncated: means over samples;
    median_length: over all samples; tokens_per_correct: all tokens, of wrong answers too, per correct answer (infinite without
    one). Means are over problems, so that a rejected row does not make its problem count less.
    """
    whole = np.concatenate([np.arange(len(found))[None], picks])
    with np.errstate(all="ignore"):
        if name == "median_length":
            return np.array([np.nanmedian(found.length[rows]) for rows in whole])
        if name == "tokens_per_correct":
            tokens, right = _row_mean(found.length), _row_mean(found.correct)
            return np.nansum(tokens[whole], axis=1) / np.nansum(right[whole], axis=1)
        values = {
            "avg": lambda: _row_mean(found.correct),
            "pass": lambda: pass_at(found.correct, k),
            "maj": lambda: found.majority,
            "length": lambda: _row_mean(found.length),
            "truncated": lambda: _row_mean(found.truncated),
        }[name]()
        return _mean(values[whole])


def _estimates(drawn: dict[str, np.ndarray], bounded: bool = False) -> dict[str, Estimate]:
    """Estimates of what has a value; a bound may be infinite unless `bounded`. Resamples without a value are left out, while
    they are few: where one problem alone has a value they are a quarter or more, where two have one an eighth or so."""
    found = {}
    for name, values in drawn.items():
        told = values[1:][~np.isnan(values[1:])]
        if np.isnan(values[0]) or len(told) < 0.8 * RESAMPLES:
            continue
        low, high = np.quantile(told, (0.025, 0.975), method="nearest")
        if not bounded or np.isfinite([values[0], low, high]).all():
            found[name] = Estimate(float(values[0]), float(low), float(high))
    return found


def _answered(found: Samples) -> np.ndarray:
    """Problems [N] with a sample that was not rejected."""
    return np.isfinite(found.correct).any(1)


def _select(found: Samples, rows: np.ndarray) -> Samples:
    parts = {name: getattr(found, name)[rows] for name in ("correct", "truncated", "length", "majority")}
    return replace(found, **parts)


def _picks(size: int, seed: int) -> np.ndarray:
    """Problems [R, N] drawn with replacement. Raises ValueError for fewer than two: there is no spread to resample."""
    if size < 2:
        raise ValueError(f"{size} problems are too few for an interval: 2 at least")
    return np.random.default_rng(seed).integers(0, size, (RESAMPLES, size))


def _row_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the samples of each problem [N, K] -> [N]; NaN without one."""
    count = np.isfinite(values).sum(1)
    return np.where(count, np.nansum(values, axis=1) / np.maximum(count, 1), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without the NaN ones; NaN where there is nothing else."""
    count = np.isfinite(values).sum(-1)
    return np.nansum(values, axis=-1) / np.where(count, count, np.nan)


# ---- over seeds --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tested:
    """A mean over seeds and problems with its 95 % interval, and the two-sided p of its being 0; None where nothing tells."""

    value: float
    low: float
    high: float
    p: float | None


def over_seeds(values: np.ndarray) -> Tested:
    """Mean of values [S, P], seeds x problems, when both are samples of what might have been (two-way random effects).

    The standard error is sqrt(v_seed / S + v_problem / P - v_rest / (S P)), where v are the variances of the seeds' means, of the
    problems' means and of what is left, and at least either of the first two terms; t has S - 1 degrees of freedom, which is
    careful where problems vary more than seeds (98.7 % of intervals hold the truth in the test). With one seed
    the interval is a bootstrap over problems: what training again would change is unknown, and p is None. Problems with a NaN
    leave. Raises ValueError for fewer than two problems.
    """
    values = values[:, np.isfinite(values).all(0)]
    seeds, size = values.shape
    if seeds == 1:
        drawn = values[0][np.concatenate([np.arange(size)[None], _picks(size, 0)])].mean(1)
        low, high = np.quantile(drawn[1:], (0.025, 0.975))
        return Tested(float(drawn[0]), float(low), float(high), None)
    if size < 2:
        raise ValueError(f"{size} problems are too few for an interval: 2 at least")
    mean, by_seed, by_problem = values.mean(), values.mean(1), values.mean(0)
    rest = values - by_seed[:, None] - by_problem + mean
    parts = by_seed.var(ddof=1) / seeds, by_problem.var(ddof=1) / size
    shared = (rest**2).sum() / ((seeds - 1) * (size - 1)) / (seeds * size)
    error = math.sqrt(max(sum(parts) - shared, *parts))
    half = student_t(0.05, seeds - 1) * error
    p = tail(abs(mean) / error, seeds - 1) if error else float(mean == 0)
    return Tested(float(mean), float(mean - half), float(mean + half), p)


def tail(t: float, freedom: int) -> float:
    """P(|T| > t) of Student's t with `freedom` degrees: with T = sqrt(freedom) tan(x) its density is cos(x)^(freedom - 1)."""
    grid, mass = _half_t(freedom)
    return float(1 - np.interp(math.atan(t / math.sqrt(freedom)), grid, mass))


def student_t(p: float, freedom: int) -> float:
    """The t that |T| exceeds with chance `p`."""
    grid, mass = _half_t(freedom)
    return math.sqrt(freedom) * math.tan(float(np.interp(1 - p, mass, grid)))


def _half_t(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Angles from 0 to a right angle, and the mass of |T| up to each."""
    grid = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(grid) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return grid, mass / mass[-1]


def holm(chances: list[float]) -> list[float]:
    """p-values of a family of tests, each raised for the others' sake (Holm 1979)."""
    order = np.argsort(chances)
    raised = np.maximum.accumulate([(len(chances) - i) * chances[place] for i, place in enumerate(order)])
    found = np.empty(len(chances))
    found[order] = np.minimum(raised, 1.0)
    return found.tolist()


def per_problem(found: Samples, name: str) -> np.ndarray:
    """Means over the samples of each problem [N] of `correct`, `length` or `truncated`; NaN where all were rejected."""
    return _row_mean(getattr(found, name))
