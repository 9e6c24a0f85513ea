"""Which problems a round asks, as a function of pass rates, seed and round. Arrays in, indices out.

The pass rate p of a problem is the share of correct verdicts among its graded traces. Problems whose p is near 0 or 1 give groups
of equal rewards, so their advantages are 0 and nothing is learned from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.config import Source
from pipeline.problems.sources import epoch_indices


@dataclass(frozen=True, eq=False)
class PassRates:
    """Verdicts of the N problems of a source: how many were graded, and how many of these were correct, int64 [N] each."""

    correct: np.ndarray
    graded: np.ndarray

    @classmethod
    def none(cls, size: int) -> PassRates:
        """Nothing is known of `size` problems."""
        return cls(np.zeros(size, np.int64), np.zeros(size, np.int64))

    def updated(self, later: PassRates) -> PassRates:
        """With the later verdicts of each problem that has some. Only these are of a policy like the present one."""
        return PassRates(
            *(np.where(later.graded > 0, b, a) for a, b in ((self.correct, later.correct), (self.graded, later.graded)))
        )

    @property
    def known(self) -> np.ndarray:
        """Whether a problem has a known pass rate, bool [N]."""
        return self.graded > 0

    @property
    def rate(self) -> np.ndarray:
        """The pass rate, float64 [N]; NaN where it is not known."""
        return np.divide(self.correct, self.graded, out=np.full(len(self.graded), np.nan), where=self.known)


@dataclass(frozen=True, eq=False)
class Candidates:
    """The problems of a source from which rounds may take, bool [N], and why the others are left out.

    below, above: problems with a pass rate outside the bounds. unmeasured: problems without a known one.
    variance: expected p (1 - p) of each problem, float64 [N]. None where every problem has the same chance.
    """

    fits: np.ndarray
    below: int
    above: int
    unmeasured: int
    variance: np.ndarray | None

    @classmethod
    def of(cls, source: Source, rates: PassRates) -> Candidates:
        """The problems that the settings of a source let in."""
        low, high = source.pass_rate
        below, above = rates.rate < low, rates.rate > high
        fits = ~(below | above) & (rates.known | (source.unmeasured == "kept"))
        variance = expected_variance(rates) if source.sampling == "variance" else None
        return cls(fits, int(below.sum()), int(above.sum()), int((~rates.known).sum()), variance)

    def first(self, seed: int, number: int, start: int, count: int) -> tuple[list[int], int]:
        """The `count` problems that round `number` asks first, and the place in the endless order behind them.

        `start` is the place behind the earlier rounds. With `variance` every round draws without regard to the earlier ones. At
        least one problem must fit. A problem may come twice at the end of an epoch, or when fewer than `count` fit.
        """
        if self.variance is None:
            return walk(self.fits, seed, start, count)
        order = drawn(self.fits, self.variance, seed, number)
        return np.resize(order, count).tolist(), start

    def further(self, seed: int, number: int, start: int, count: int, taken: list[int]) -> tuple[list[int], int]:
        """The same for at most `count` problems that are not among those `taken`. Fewer when no more fit."""
        fits = self.fits.copy()
        fits[taken] = False
        count = min(count, int(fits.sum()))
        if self.variance is None:
            return walk(fits, seed, start, count, twice=False)
        return drawn(fits, self.variance, seed, number)[:count].tolist(), start


def expected_variance(rates: PassRates) -> np.ndarray:
    """Mean of p (1 - p) over what p may be after c of n traces were correct: (c+1)(n-c+1) / ((n+2)(n+3)), float64 [N].

    p is Beta(c+1, n-c+1): before any verdict all p are equally likely. It is 1/6 where nothing is known, never 0, and near
    c/n (1 - c/n) for large n. p (1 - p) is the variance of a verdict, and so of the advantages of a group (2502.12272).
    """
    c, n = rates.correct, rates.graded
    return (c + 1) * (n - c + 1) / ((n + 2) * (n + 3))


def walk(fits: np.ndarray, seed: int, start: int, count: int, twice: bool = True) -> tuple[list[int], int]:
    """The next `count` problems that fit, from a place of the endless shuffled order on, and the place behind the last one.

    fits: bool [N]. The order is that of `epoch_indices`: every problem comes once an epoch. Without `twice` a problem of the
    next epoch is passed over when it was found already; then at least `count` must fit.
    """
    found: list[int] = []
    size, place = len(fits), start
    while len(found) < count:
        rest = size - place % size
        order = epoch_indices(size, seed, place, rest)
        free = fits[order] if twice else fits[order] & ~np.isin(order, found)
        places = np.flatnonzero(free)[: count - len(found)]
        found += order[places].tolist()
        place += int(places[-1]) + 1 if len(found) == count else rest
    return found, place


def drawn(fits: np.ndarray, weights: np.ndarray, seed: int, number: int) -> np.ndarray:
    """All problems that fit, in the order of a draw without replacement with these chances: int64 [problems that fit].

    fits: bool [N]. weights: float64 [N], above 0. The order is by log(u) / weight, with u uniform (Efraimidis and Spirakis 2006).
    It depends on seed and round alone, and leaving out a problem does not change the order of the others.
    """
    with np.errstate(divide="ignore"):  # u may be 0
        keys = np.log(np.random.RandomState([seed % 2**32, number % 2**32, 1]).random_sample(len(fits))) / weights
    order = np.argsort(-keys, kind="stable")
    return order[fits[order]]


def num_further(signals: int, asked: int, wanted: int, most: int) -> int:
    """How many further prompts a round asks at one time, in place of groups without signal. 0 when it has enough, or may not.

    signals: groups with a signal among the `asked` ones. wanted: groups that the round should have. most: further prompts in all.

    The missing groups are divided by the share of groups with a signal so far, so that one or two times mostly suffice. A time
    asks at most `wanted` prompts. DAPO (2503.14476) asks whole batches until enough groups have a signal.
    """
    missing, left = wanted - signals, most - (asked - wanted)
    if missing <= 0 or left <= 0:
        return 0
    likely = math.ceil(missing * (asked + 2) / (signals + 1))
    return min(left, wanted, max(missing, likely))
