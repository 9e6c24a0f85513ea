"""How far a figure can be trusted: intervals over problems, and tests over seeds.

A problem is one observation, so that its samples stay together. Shares, medians and ratios have intervals of their own, since a
bootstrap of few or rare events is too narrow. What each method holds in simulations stands in tests/evidence/test_intervals.py
and tests/audit/test_audit_figures.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FEW = 5  # with fewer seeds, Satterthwaite's intervals would contain the true mean in 87 to 94 % of the cases


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

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
    """A mean over seeds and problems with its 95 % interval, and the two-sided p-value of the hypothesis that it is 0.

    p is None for one seed, because one seed does not show how much training varies.
    """

    value: float
    low: float
    high: float
    p: float | None


def of_shares(values: np.ndarray, samples: int | None = None) -> Estimate:
    """Mean of per-problem shares [N] in [0, 1] by Wilson's interval (1927), with t for the normal quantile.

    samples: of all problems together; None: one each. The number of problems is the effective one: that whose single samples
    would vary as much as the shares do. It is at most `samples`. A NaN is left out. Raises ValueError for fewer than two values.
    """
    values = _known(values)
    size, mean = len(values), float(values.mean())
    spread, most = float(values.var(ddof=1)), max(size, samples or 0)
    count = min(most, max(1.0, mean * (1 - mean) * size / spread)) if spread else size
    square = quantile(size - 1) ** 2
    middle = (mean + square / (2 * count)) / (1 + square / count)
    half = math.sqrt(square * (mean * (1 - mean) / count + square / (4 * count**2))) / (1 + square / count)
    return Estimate(mean, max(0.0, min(mean, middle - half)), min(1.0, max(mean, middle + half)))


def of_gaps(values: np.ndarray) -> Estimate:
    """Mean of differences of shares [N], paired by problem and in [-1, 1], by the interval of Bonett and Price (2012).

    Two problems are added, one for each side, so that rare differences do not look certain. They differ as much as the problem
    that differs most, since samples of a problem may change together. Where none differs, they do by all of their samples.
    A NaN is left out. Raises ValueError for fewer than two values.
    """
    values = _known(values)
    size, added = len(values), float(np.abs(values).max()) or 1.0
    middle = float(values.sum()) / (size + 2)
    variance = (float((values**2).sum()) + 2 * added**2) / (size + 2) - middle**2
    half, mean = quantile(size - 1) * math.sqrt(variance / (size + 2)), float(values.mean())
    return Estimate(mean, max(-1.0, min(mean, middle - half)), min(1.0, max(mean, middle + half)))


def of_means(values: np.ndarray) -> Estimate:
    """Mean of per-problem values [N] by the wider ends of Student's t and of `_unskewed`, since lengths are skew.

    A NaN is left out. Raises ValueError for fewer than two values.
    """
    values = _known(values)
    mean, half = float(values.mean()), _half(values)
    below, above = _unskewed(values)
    return Estimate(mean, mean - max(half, below), mean + max(half, above))


def of_median(values: np.ndarray) -> Estimate:
    """Median of all samples [N, K] by Woodruff's interval (1952); a problem is one observation. A NaN is left out.

    The share of samples below the median has an interval around one half, by Student's t over problems. So has the share up to
    it, and the two differ where many samples are equal, as at a limit. The samples at the ends are the ends of the interval.
    Raises ValueError for fewer than two problems.
    """
    known, median = np.sort(values[np.isfinite(values)]), np.nanmedian(values)
    below, upto = (placed.std(ddof=1) for placed in (ranked(values, equal=0.0), ranked(values, equal=1.0)))
    times = quantile(len(values) - 1) / math.sqrt(len(values))
    last = len(known) - 1
    low, high = math.floor((0.5 - times * below) * len(known)), math.ceil((0.5 + times * upto) * len(known)) - 1
    low, high = min(max(0, low), last), min(max(0, high), last)
    return Estimate(float(median), float(min(median, known[low])), float(max(median, known[high])))


def ranked(values: np.ndarray, equal: float = 0.5) -> np.ndarray:
    """By how much each problem's samples lie below the median of all samples [N, K], in units of a problem's samples: [N].

    A sample that equals the median counts as `equal`.
    """
    known = np.isfinite(values)
    if len(values) < 2:
        raise ValueError(f"{len(values)} problems are too few for an interval: 2 at least")
    median = np.median(values[known])
    placed = np.where(known, (values < median) + equal * (values == median) - 0.5, 0.0).sum(1)
    return np.asarray(placed * len(values) / known.sum())


def of_ratio(top: np.ndarray, bottom: np.ndarray) -> Estimate:
    """The ratio of the means of positive values [N] to those of [N] at least 0, paired by problem.

    The logarithm has an interval by the delta method and Student's t. `bottom` are shares. Where all of them are 0 the ratio is
    infinite, and its lower end is that of the largest share that is likely. Raises ValueError for fewer than two problems.
    """
    if len(top) < 2:
        raise ValueError(f"{len(top)} problems are too few for an interval: 2 at least")
    if not bottom.any():
        return Estimate(math.inf, float(top.mean()) / of_shares(bottom).high, math.inf)
    value = float(top.mean() / bottom.mean())
    factor = math.exp(min(_half(top / top.mean() - bottom / bottom.mean()), 700.0))
    return Estimate(value, value / factor, value * factor)


def of_part(part: np.ndarray, whole: np.ndarray) -> Estimate | None:
    """The ratio of two means of values [N] of any sign, paired by problem, by Fieller's interval (1954).

    None where the mean of `whole` cannot be told from 0: the interval has no end then.
    """
    size = len(whole)
    (pp, pw), (_, ww) = np.cov(part, whole) / size * quantile(size - 1) ** 2
    top, bottom = float(part.mean()), float(whole.mean())
    square, cross = bottom**2 - ww, top * bottom - pw
    if not square > 0:
        return None
    half = math.sqrt(max(0.0, cross**2 - square * (top**2 - pp)))
    return Estimate(top / bottom, float(cross - half) / float(square), float(cross + half) / float(square))


def between(one: Estimate, other: Estimate, correlation: float) -> Estimate:
    """one - other, from their intervals and the correlation of their errors, by MOVER (Zou and Donner 2008)."""
    value = one.value - other.value
    below, above = one.value - one.low, one.high - one.value
    down, up = other.value - other.low, other.high - other.value
    low = math.sqrt(max(0.0, below**2 + up**2 - 2 * correlation * below * up))
    high = math.sqrt(max(0.0, above**2 + down**2 - 2 * correlation * above * down))
    return Estimate(value, value - low, value + high)


def together(parts: list[Estimate]) -> Estimate:
    """The mean of independent figures. Its interval comes from theirs by MOVER (Zou and Donner 2008)."""
    value, size = float(np.mean([part.value for part in parts])), len(parts)
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / size
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / size
    return Estimate(value, value - below, value + above)


def _known(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        raise ValueError(f"{len(values)} problems are too few for an interval: 2 at least")
    return values


def quantile(freedom: int, share: float = 0.975) -> float:
    """The quantile of Student's t below which `share` of it lies."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, share))


def jackknife(value: float, without: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Estimate | None:
    """A figure with its interval from its values without each of G equal parts of the sample [G], by Student's t (Tukey 1958).

    Figure and interval stay within `bounds`, which an estimate of a cosine may pass. None when one of the values is not there.
    """
    parts = len(without)
    if not np.isfinite([value, *without]).all():
        return None
    half = quantile(parts - 1) * np.sqrt((parts - 1) * without.var())
    return Estimate(*(float(part) for part in np.clip([value, value - half, value + half], *bounds)))


def of_signal(value: float, without: np.ndarray) -> Estimate | None:
    """A share of signal in (0, 1), from its values without each of G equal parts of the sample [G].

    Noise that differs much between the parts makes Student's interval too short. Hall's transformation (1992) takes the skewness
    out of the parts' log odds. The ends are the wider ones of its interval and of `jackknife`'s. None as for `jackknife`.
    """
    found, parts = jackknife(value, without, (0.0, 1.0)), len(without)
    if found is None:
        return None
    odds, left = (np.log(x / (1 - x)) for x in (np.clip(part, 1e-6, 1 - 1e-6) for part in (value, without)))
    below, above = _unskewed(parts * odds - (parts - 1) * left)
    if not below:
        return found
    low, high = (float(1 / (1 + np.exp(-end))) for end in (odds - below, odds + above))
    return Estimate(found.value, min(found.low, low), max(found.high, high))


def of_parts(value: float, without: np.ndarray) -> Estimate | None:
    """A figure without bounds, such as a difference, by the wider ends of `jackknife` and of Hall's transformation (1992).

    Noise that differs much between the parts makes the error skew. None as for `jackknife`.
    """
    found, parts = jackknife(value, without), len(without)
    if found is None:
        return None
    below, above = _unskewed(parts * value - (parts - 1) * without)
    return Estimate(value, min(found.low, value - below), max(found.high, value + above))


def _half(values: np.ndarray) -> float:
    """Half of Student's interval of the mean of values [N]."""
    return quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))


def _unskewed(values: np.ndarray) -> tuple[float, float]:
    """How far Hall's interval (1992) of the mean of values [N] reaches below the mean and above it. Both are 0 without a spread.

    His transformation takes the skewness out of Student's statistic. It is monotone, so the quantiles are transformed back.
    """
    size, spread = len(values), float(values.std())
    if size < 3 or not spread:
        return 0.0, 0.0
    skew = float(((values - values.mean()) ** 3).mean()) / spread**3 * math.sqrt(size - 1) / (size - 2)  # of the mean
    if abs(skew) < 1e-6:
        return _half(values), _half(values)
    times, error = quantile(size - 1), float(values.std(ddof=1)) / math.sqrt(size)
    one, other = (error * 3 / skew * float(np.cbrt(1 + skew * (t - skew / 6)) - 1) for t in (times, -times))
    return one, -other


def with_signal(found: Estimate | None, signal: Estimate | None) -> Estimate | None:
    """A cosine that has the root of `signal` as a factor, with an interval at least as wide as the signal's would make it."""
    if found is None or signal is None or not signal.value > 0:
        return found
    ends = [found.value * math.sqrt(end / signal.value) for end in (signal.low, signal.high)]
    return Estimate(found.value, max(-1.0, min(found.low, *ends)), min(1.0, max(found.high, *ends)))


class Crossed(NamedTuple):
    """Means over seeds and problems that are both random, their standard errors, and degrees of freedom of Student's t, [...]."""

    mean: np.ndarray
    error: np.ndarray
    freedom: np.ndarray


def crossed(values: np.ndarray) -> Crossed:
    """Means of values [..., S, N], seeds x problems, under two crossed random effects: Y = mean + seed + problem + rest.

    With the mean squares MS of seeds, problems and rest, the squared standard error is
    (MS_seed + max(MS_problem - MS_rest, 0)) / (S N). Satterthwaite's degrees of freedom (1946) are the square of that sum,
    divided by the sum of MS^2 / freedom over the mean squares in it. Fewer than FEW seeds have S - 1 degrees of freedom, because
    Satterthwaite's are too many there. Raises ValueError for fewer than two seeds or problems.
    """
    seeds, size = values.shape[-2:]
    if min(seeds, size) < 2:
        raise ValueError(f"{seeds} seeds and {size} problems are too few: 2 of each at least")
    by_seed, by_problem, mean = values.mean(-1), values.mean(-2), values.mean((-2, -1))
    rest = values - by_seed[..., :, None] - by_problem[..., None, :] + mean[..., None, None]
    of_seeds, of_problems = size * by_seed.var(-1, ddof=1), seeds * by_problem.var(-1, ddof=1)
    of_rest = (rest**2).sum((-2, -1)) / ((seeds - 1) * (size - 1))
    more = of_problems > of_rest
    total = of_seeds + np.where(more, of_problems - of_rest, 0.0)
    spread = of_seeds**2 / (seeds - 1)
    spread = spread + np.where(more, of_problems**2 / (size - 1) + of_rest**2 / ((seeds - 1) * (size - 1)), 0.0)
    with np.errstate(invalid="ignore"):  # equal values have no spread
        freedom = np.fmax(total**2 / spread, seeds - 1) if seeds >= FEW else np.full_like(total, seeds - 1)
    return Crossed(mean, np.sqrt(total / (seeds * size)), freedom)


def over_seeds(values: np.ndarray, alone: Callable[[np.ndarray], Estimate] | None = None, samples: int = 1) -> Tested:
    """Mean of values [S, N], seeds x problems, where seeds and problems are both random samples. See `crossed`.

    `alone` makes an interval over problems from values [N]; None: nothing but `crossed`, and `of_means` for one seed. That over
    the means of seeds also bounds the interval over all seeds: answers that are nearly all right would otherwise look certain,
    and lengths are skew. samples: of a problem in one seed, for shares. A problem with a NaN is left out. Raises ValueError for
    fewer than two problems. The ends of shares stay within 0 and 1, and those of their differences within -1 and 1; p does not
    know of that.
    """
    values = values[:, np.isfinite(values).all(0)]
    seeds, size = values.shape
    if seeds == 1:
        found = _alone(values[0], alone or of_means, samples * size)
        return Tested(found.value, found.low, found.high, None)
    if size < 2:
        raise ValueError(f"{size} problems are too few for an interval: 2 at least")
    from scipy.special import stdtr, stdtrit  # takes 0.5 s, and one seed does not need it

    mean, error, freedom = (float(part) for part in crossed(values))
    times = float(stdtrit(freedom, 0.975))
    low, high = mean - times * error, mean + times * error
    if alone is not None:
        floor = _alone(values.mean(0), alone, samples * values.size)
        low, high = min(low, floor.low), max(high, floor.high)
    reach = mean - low if mean > 0 else high - mean
    p = 2 * float(stdtr(freedom, -times * abs(mean) / reach)) if reach else float(mean == 0)
    least, most = _POSSIBLE.get(alone, (-math.inf, math.inf))
    return Tested(mean, max(low, least), min(high, most), p)


_POSSIBLE: dict[Callable[..., Estimate] | None, tuple[float, float]] = {of_shares: (0.0, 1.0), of_gaps: (-1.0, 1.0)}


def _alone(values: np.ndarray, alone: Callable[..., Estimate], samples: int) -> Estimate:
    return alone(values, samples) if alone is of_shares else alone(values)


def holm(chances: list[float]) -> list[float]:
    """p-values of a family of tests, corrected for their number (Holm 1979). scipy has only Benjamini's and Hochberg's method."""
    order = np.argsort(chances)
    raised = np.maximum.accumulate([(len(chances) - i) * chances[place] for i, place in enumerate(order)])
    corrected = np.empty(len(chances))
    corrected[order] = np.minimum(raised, 1.0)
    return corrected.tolist()
