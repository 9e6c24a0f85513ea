"""What other labels would make of stored traces (2605.13255, section 5.5), without an engine: numpy, whole arrays, one core.

A point is one choice of label settings. `sweep` measures many points on the same signals and computes once what they share:
|delta| and entropy deciles, the magnitudes of an epsilon, the gates on the entropy itself, the lookahead of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.method import regimes
from pipeline.method.regimes import NUM_REGIMES, RaggedSignals

if TYPE_CHECKING:
    from pipeline.config import Label, Profile

NUM_DECILES = 10


@dataclass(frozen=True)
class Point:
    """One choice of the settings that the stages `profile` and `label` read."""

    profile: Profile
    label: Label

    def ungated(self) -> Point:
        """The same point with gamma = 0, at which every gate is 1."""
        return replace(self, label=self.label.model_copy(update={"gamma": 0.0}))


@dataclass(frozen=True, eq=False)
class StoredSignals(RaggedSignals):
    """Stored signals of R traces in K rounds: what labels are made from.

    Round k has the rows rounds[k] .. rounds[k + 1] (int64 [K + 1]) and the largest entropy peaks[k] in nats, float64 [K]: the
    scope of its gate (Eq. 5). vocab_size is V.
    """

    rounds: np.ndarray
    peaks: np.ndarray
    vocab_size: int


class PointLabels(NamedTuple):
    """Labels of every token at one point: regime int8 [N]; the others float32 [N].

    gate_now is the gate on the entropy, gate_ahead on the lookahead entropy, gate the one of the two that the point uses.
    factor = magnitude x gate; the trace's advantage times it is the token weight (Eq. 7).
    """

    regime: np.ndarray
    gate: np.ndarray
    gate_now: np.ndarray
    gate_ahead: np.ndarray
    factor: np.ndarray


@dataclass(frozen=True, eq=False)
class Figures:
    """What a point makes of the traces. Arrays [4] are by regime (lock, mid, pivot, fork), arrays [10] by decile; NaN: no tokens.

    Over all tokens: `shares` of the regimes, mean `gates`, and `restored`, the mean of omega(H^CL) - omega(H). The other figures
    are over tokens of traces that have an advantage. `factors` is the mean of magnitude x gate. `kept` is the sum of |weight| as
    a share of that sum at gamma = 0. `effective_tokens` is (sum |weight|)^2 / sum weight^2 (Kish), and `effective_share` its
    share of those tokens. `correlation` is that of magnitude x gate with |delta|.
    """

    shares: np.ndarray
    gates: np.ndarray
    factors: np.ndarray
    restored: np.ndarray
    kept: float
    effective_tokens: float
    effective_share: float
    correlation: float
    decile_gates: np.ndarray
    decile_factors: np.ndarray


@dataclass(frozen=True, eq=False)
class Deciles:
    """Tokens by decile of teacher entropy, lowest first (2605.13255, Figure 4). Each array is [10].

    `tokens` counts them. `entropy` and `delta` are the means of entropy and |delta| in nats. Equal entropies share a decile, so
    deciles may differ in size.
    """

    tokens: np.ndarray
    entropy: np.ndarray
    delta: np.ndarray


class Relabel:
    """Stored signals, and the arrays that several points share. It keeps one lookahead, so group points by their window."""

    def __init__(self, signals: StoredSignals) -> None:
        self.signals = signals
        self.delta = np.abs(signals.teacher_logprobs - signals.student_logprobs)
        strength = np.abs(signals.advantage).astype(np.float64)
        self.strength = np.repeat(strength, np.diff(signals.offsets))
        self.decile = decile(signals.entropy)
        # Each cache is keyed by settings alone, as numpy arrays cannot be hashed.
        self.ahead: Callable[[int], np.ndarray] = lru_cache(1)(
            lambda window: regimes.lookahead_min(signals.entropy, signals.offsets, window)
        )
        self.magnitude: Callable[[float], np.ndarray] = lru_cache(2)(self._magnitude)
        self.gate_now: Callable[[Label], np.ndarray] = lru_cache(8)(lambda settings: self._gate(signals.entropy, settings))

    def labels(self, point: Point) -> PointLabels:
        """Labels of every token, equal to what the label stage would write. Raises ValueError on thresholds out of order."""
        ahead, settings = self.ahead(point.profile.window), point.label
        now, looking = self.gate_now(settings), self._gate(ahead, settings)
        gate = looking if settings.lookahead else now
        codes = regimes.regimes(self.signals.entropy, ahead, self.signals.offsets, self._scale(point), point.profile)
        return PointLabels(codes, gate, now, looking, self.magnitude(settings.epsilon) * gate)

    def figures(self, point: Point) -> Figures:
        """What `point` makes of the traces."""
        labels = self.labels(point)
        signal = self.strength > 0
        restored = labels.gate_ahead - labels.gate_now
        weights = self.strength * labels.factor
        total, square = weights.sum(), weights @ weights
        return Figures(
            shares=np.bincount(labels.regime, minlength=NUM_REGIMES) / max(len(labels.regime), 1),
            gates=means(labels.gate, labels.regime, NUM_REGIMES),
            factors=means(labels.factor, labels.regime, NUM_REGIMES, signal),
            restored=means(restored, labels.regime, NUM_REGIMES),
            kept=_ratio(total, self.strength @ self.magnitude(point.label.epsilon)),
            effective_tokens=_ratio(total * total, square),
            effective_share=_ratio(total * total, square * signal.sum()),
            correlation=correlation(labels.factor, self.delta, signal),
            decile_gates=means(labels.gate, self.decile, NUM_DECILES),
            decile_factors=means(labels.factor, self.decile, NUM_DECILES, signal),
        )

    def deciles(self) -> Deciles:
        """Entropy and |delta| by decile of entropy: the same at every point."""
        tokens = np.bincount(self.decile, minlength=NUM_DECILES)
        entropy, delta = (means(values, self.decile, NUM_DECILES) for values in (self.signals.entropy, self.delta))
        return Deciles(tokens, entropy, delta)

    def _magnitude(self, epsilon: float) -> np.ndarray:
        s = self.signals
        return regimes.magnitude(s.teacher_logprobs, s.student_logprobs, s.offsets, s.advantage, epsilon)

    def _gate(self, entropy: np.ndarray, settings: Label) -> np.ndarray:
        omega = np.empty_like(entropy)
        largest = regimes.normaliser(self.signals.peaks, settings).tolist()
        for tokens, normaliser in zip(round_tokens(self.signals), largest, strict=True):
            omega[tokens] = regimes.gate(entropy[tokens], normaliser, settings)
        return omega

    def _scale(self, point: Point) -> float | np.ndarray:
        """What entropies are divided by before they meet the thresholds, in nats: one number, or one per row [R]."""
        scale = regimes.threshold_scale(self.signals.peaks, self.signals.vocab_size, point.profile, point.label)
        return np.repeat(scale, np.diff(self.signals.rounds)) if np.ndim(scale) else scale


def sweep(signals: StoredSignals, points: Iterable[Point]) -> dict[Point, Figures]:
    """Figures of every point, in the order of `points`. Raises ValueError on malformed signals or thresholds."""
    signals.check()
    relabel, distinct = Relabel(signals), list(dict.fromkeys(points))
    by_window = {point: relabel.figures(point) for point in sorted(distinct, key=lambda point: point.profile.window)}
    return {point: by_window[point] for point in distinct}


def select(signals: StoredSignals, number: int, rows: np.ndarray) -> StoredSignals:
    """The signals of some rows of round `number` alone. The scope of their gate stays the round.

    rows: int64 [B], counted from the round's first row.
    """
    rows = rows + signals.rounds[number]
    lengths = np.diff(signals.offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1]) + np.repeat(signals.offsets[rows] - offsets[:-1], lengths)
    columns = {name: getattr(signals, name)[tokens] for name in ("entropy", "teacher_logprobs", "student_logprobs")}
    return replace(
        signals,
        **columns,
        offsets=offsets,
        advantage=signals.advantage[rows],
        rounds=np.array([0, len(rows)]),
        peaks=signals.peaks[number : number + 1],
    )


def token_weights(signals: StoredSignals, points: Iterable[Point]) -> list[np.ndarray]:
    """Token weight A w omega (Eq. 7) of every token at each point, float32 [N]."""
    relabel, advantage = Relabel(signals), np.repeat(signals.advantage, np.diff(signals.offsets))
    return [advantage * relabel.labels(point).factor for point in points]


def round_tokens(signals: StoredSignals) -> Iterator[slice]:
    """The tokens of each round."""
    edges = signals.offsets[signals.rounds].tolist()
    for first, last in pairwise(edges):
        yield slice(first, last)


def decile(values: np.ndarray) -> np.ndarray:
    """Decile of each value, 0 the lowest: [N] -> int8 [N]. Equal values share one."""
    if not len(values):
        return np.empty(0, np.int8)
    cuts = np.quantile(values, np.arange(1, NUM_DECILES) / NUM_DECILES)
    return np.searchsorted(cuts.astype(values.dtype), values, side="left").astype(np.int8)


def means(values: np.ndarray, codes: np.ndarray, num_codes: int, mask: np.ndarray | None = None) -> np.ndarray:
    """Mean of values [N] by code [N] where mask [N] holds -> float64 [num_codes], NaN where there is no value."""
    if mask is not None and not mask.all():
        values, codes = values[mask], codes[mask]
    counts = np.bincount(codes, minlength=num_codes)
    sums = np.bincount(codes, values, minlength=num_codes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def correlation(one: np.ndarray, other: np.ndarray, mask: np.ndarray) -> float:
    """Pearson's correlation of two arrays [N] where mask [N] holds; NaN where one of them does not vary."""
    if not mask.all():
        one, other = one[mask], other[mask]
    if not len(one):
        return float("nan")
    a, b = one - one.mean(dtype=np.float64), other - other.mean(dtype=np.float64)
    return _ratio(float(a @ b), float(np.sqrt((a @ a) * (b @ b))))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")
