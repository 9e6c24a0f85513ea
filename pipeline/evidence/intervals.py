"""How much to believe a figure: bootstrap intervals over problems, and tests over seeds.

One bootstrap serves every figure of the tree. It draws problems, so that the samples of one problem stay together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
TOLD = 0.8  # the least share of resamples that have a value; with only one or two problems that tell, fewer do


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def text(self, scale: float = 1.0, digits: int = 1, signed: bool = False) -> str:
        """`47.3 [43.0, 51.6]`."""
        sign = "+" if signed else ""
        value, low, high = (f"{x * scale:{sign}.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


@dataclass(frozen=True)
class Tested:
    """A mean over seeds and problems with its 95 % interval, and the two-sided p of a true mean of 0.

    p is None for one seed: nothing then tells what training again would change.
    """

    value: float
    low: float
    high: float
    p: float | None


def resampled(size: int, seed: int = 0) -> np.ndarray:
    """Row numbers of `size` problems as they are, then of RESAMPLES draws with replacement -> [1 + R, N].

    Two sides of a difference take the same rows, so that they pair by problem. Raises ValueError for fewer than two problems:
    there is no spread to resample.
    """
    if size < 2:
        raise ValueError(f"{size} problems are too few for an interval: 2 at least")
    draws = np.random.default_rng(seed).integers(0, size, (RESAMPLES, size))
    return np.concatenate([np.arange(size)[None], draws])


def estimate(drawn: np.ndarray, bounded: bool = False) -> Estimate | None:
    """A figure on the problems as they are and on every resample [1 + R], with its percentile interval.

    A resample without a value (NaN) is left out. The result is None where the figure itself has no value, or where fewer than
    TOLD of the resamples have one. A bound may be infinite; with `bounded` the result is then None too. Both bounds are values
    of a resample: between a finite one and an infinite one there is nothing to interpolate.
    """
    told = drawn[1:][~np.isnan(drawn[1:])]
    if np.isnan(drawn[0]) or len(told) < TOLD * (len(drawn) - 1):
        return None
    low, high = np.quantile(told, (0.025, 0.975), method="nearest")
    if bounded and not np.isfinite([drawn[0], low, high]).all():
        return None
    return Estimate(float(drawn[0]), float(low), float(high))


def bootstrap(values: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of per-problem values [N] with its interval; NaN is a problem without an answer, which leaves.

    Raises ValueError for fewer than two values.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    found = estimate(values[resampled(len(values), seed)].mean(1))
    assert found is not None  # every value is finite
    return found


def over_seeds(values: np.ndarray) -> Tested:
    """Mean of values [S, P], seeds x problems, where both are samples of what might have been (two-way random effects).

    The standard error is sqrt(v_seed / S + v_problem / P - v_rest / (S P)), and at least either of the first two terms. The v
    are the variances of the seeds' means, of the problems' means, and of what is left. Student's t has S - 1 degrees of freedom,
    which is careful where problems vary more than seeds: 98.7 % of intervals hold the truth in the test. With one seed the
    interval is a bootstrap over problems. Problems with a NaN leave. Raises ValueError for fewer than two problems.
    """
    values = values[:, np.isfinite(values).all(0)]
    seeds, size = values.shape
    if seeds == 1:
        found = bootstrap(values[0])
        return Tested(found.value, found.low, found.high, None)
    if size < 2:
        raise ValueError(f"{size} problems are too few for an interval: 2 at least")
    from scipy.special import stdtr, stdtrit  # 0.5 s: only where there are seeds to test

    mean, by_seed, by_problem = values.mean(), values.mean(1), values.mean(0)
    rest = values - by_seed[:, None] - by_problem + mean
    parts = by_seed.var(ddof=1) / seeds, by_problem.var(ddof=1) / size
    shared = (rest**2).sum() / ((seeds - 1) * (size - 1)) / (seeds * size)
    error = math.sqrt(max(sum(parts) - shared, *parts))
    half = stdtrit(seeds - 1, 0.975) * error
    p = 2 * float(stdtr(seeds - 1, -abs(mean) / error)) if error else float(mean == 0)
    return Tested(float(mean), float(mean - half), float(mean + half), p)


def holm(chances: list[float]) -> list[float]:
    """p-values of a family of tests, each raised for the others' sake (Holm 1979). scipy has only Benjamini and Hochberg's."""
    order = np.argsort(chances)
    raised = np.maximum.accumulate([(len(chances) - i) * chances[place] for i, place in enumerate(order)])
    found = np.empty(len(chances))
    found[order] = np.minimum(raised, 1.0)
    return found.tolist()
