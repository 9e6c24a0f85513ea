"""Entropy profiles, regimes, spans and gates on ragged arrays (2605.13255, sections 3 and 5.5): numpy, one core.

Entropies and log-probabilities are float32 nats. ragged.py says what a ragged array is. `profile` and `label` do all arithmetic
of their stages in one call, in blocks of rows that fit the cache. The other functions are their parts. `normaliser`,
`magnitude`, `lookahead_min` and `gate` are the twins of the torch functions in objective.py; a test holds each pair equal.

Settings arrive as the records that hold them (`config.Profile`, `config.Label`): a new constant changes no signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.method import ragged

if TYPE_CHECKING:
    from pipeline.config import Label, Profile, Weights
    from pipeline.contract import Scope

# 0 lock, 1 mid, 2 pivot, 3 fork: the codes of `contract.Regime`, which stands above mathematics
NUM_REGIMES = 4


@dataclass(frozen=True, eq=False)
class RaggedSignals:
    """Stored signals of R traces with N response tokens in all.

    entropy (the teacher's), teacher_logprobs, student_logprobs float32 [N] nats; offsets int64 [R + 1]; advantage [R].
    """

    entropy: np.ndarray
    teacher_logprobs: np.ndarray
    student_logprobs: np.ndarray
    offsets: np.ndarray
    advantage: np.ndarray

    def check(self) -> None:
        """Raise ValueError, naming the array, where one is malformed or a token has NaN or infinity."""
        names = ("entropy", "teacher_logprobs", "student_logprobs")
        ragged.check(self.offsets, **{name: getattr(self, name) for name in names})


class RowStatistics(NamedTuple):
    """mean, p50, p90 (linear interpolation) and maximum of each row, float32 [R]; NaN for an empty row."""

    mean: np.ndarray
    p50: np.ndarray
    p90: np.ndarray
    maximum: np.ndarray


class Spans(NamedTuple):
    """Maximal runs of one regime: S spans, those of row r at offsets[r]:offsets[r + 1].

    start, end int32 [S] within the row, end excluded; regime int8 [S]; mean_entropy, peak_entropy float32 [S] nats; offsets
    int64 [R + 1].
    """

    start: np.ndarray
    end: np.ndarray
    regime: np.ndarray
    mean_entropy: np.ndarray
    peak_entropy: np.ndarray
    offsets: np.ndarray


class EntropyProfile(NamedTuple):
    """What the profile stage writes: lookahead float32 [N] nats, statistics of each row, shares float32 [R, 4] (NaN if empty)."""

    lookahead: np.ndarray
    statistics: RowStatistics
    shares: np.ndarray


class TokenLabels(NamedTuple):
    """What the label stage writes: regime int8 [N], gate and weight float32 [N], spans."""

    regime: np.ndarray
    gate: np.ndarray
    weight: np.ndarray
    spans: Spans


def profile(entropy: np.ndarray, offsets: np.ndarray, scale: float, settings: Profile) -> EntropyProfile:
    """Lookahead entropy, row statistics and regime shares of ragged teacher entropies.

    entropy float32 [N] nats, offsets int64 [R + 1]; `scale` in nats as of `threshold_scale`.
    Raises ValueError on a malformed ragged array, a non-finite entropy or scale, or a negative window.
    """
    ragged.check(offsets, entropy=entropy)
    if not np.isfinite(scale):
        raise ValueError(f"scale: {scale}, expected a finite number of nats")
    rows_in_all = len(offsets) - 1
    lookahead, shares = np.empty_like(entropy), np.empty((rows_in_all, NUM_REGIMES), np.float32)
    statistics = RowStatistics(*np.empty((4, rows_in_all), np.float32))
    for rows, tokens, local in ragged.blocks(offsets):
        values = entropy[tokens]
        lookahead[tokens] = lowest = lookahead_min(values, local, settings.window)
        shares[rows] = regime_shares(regimes(values, lowest, local, scale, settings), local)
        for whole, part in zip(statistics, row_statistics(values, local), strict=True):
            whole[rows] = part
    return EntropyProfile(lookahead, statistics, shares)


def label(signals: RaggedSignals, lookahead: np.ndarray, scope: Scope, thresholds: Profile, settings: Label) -> TokenLabels:
    """Regimes, spans, gate (Eq. 6) and token weight A w omega (Eq. 7) of every token.

    lookahead float32 [N] nats; `scope` has the largest entropy of the round, from which M of Eq. 5 is made, and the size of the
    vocabulary. With `settings.lookahead` the gate reads the lookahead entropy (CL-EGRSD), else the entropy itself (EGRSD).
    Raises ValueError on a malformed ragged array, a non-finite signal of a row with tokens, or thresholds out of order.
    """
    signals.check()
    offsets, entropy = signals.offsets, signals.entropy
    ragged.check(offsets, lookahead=lookahead)
    advantages = ragged.per_row("advantage", signals.advantage, offsets)
    scale, largest = threshold_scale(scope.peak, scope.vocab_size, thresholds, settings), normaliser(scope.peak, settings)
    regime, omega, weight = np.empty(len(entropy), np.int8), np.empty_like(entropy), np.empty_like(entropy)
    parts = []
    for rows, tokens, local in ragged.blocks(offsets):
        values, lowest = entropy[tokens], lookahead[tokens]
        regime[tokens] = codes = regimes(values, lowest, local, scale, thresholds)
        omega[tokens] = confidence = gate(lowest if settings.lookahead else values, largest, settings)
        logprobs = signals.teacher_logprobs[tokens], signals.student_logprobs[tokens]
        factor = magnitude(*logprobs, local, advantages[rows], settings.epsilon)
        factor *= confidence
        np.multiply(factor, np.repeat(advantages[rows], np.diff(local)), out=weight[tokens])
        parts.append(spans(codes, values, local))
    return TokenLabels(regime, omega, weight, _joined(parts))


# ---- Eq. 2, 5, 6 and 8: the twins of objective.py ----------------------------------------------------------------------


def normaliser(peak: Any, constants: Weights) -> Any:
    """M = max(peak, min_normaliser) (2605.13255, Eq. 5): the largest raw entropy of a round in nats, one or an array -> alike."""
    return np.maximum(peak, constants.min_normaliser)


def lookahead_min(values: np.ndarray, offsets: np.ndarray, window: int) -> np.ndarray:
    """Least value among each token and the `window` tokens after it in its own row (Eq. 8): ragged float32 [N] -> [N].

    Raises ValueError on a negative window.
    """
    if window < 0:
        raise ValueError(f"window: {window}, expected 0 or more tokens")
    lowest = values.copy()
    for step in range(1, min(window, len(values) - 1) + 1):
        np.minimum(lowest[:-step], values[step:], out=lowest[:-step])
    # The last `window` tokens of a row have looked into the next row. They get the minimum up to the end of their own row.
    lengths = np.diff(offsets)
    back = np.arange(min(window, int(lengths.max(initial=0))))
    inside = back < lengths[:, None]
    index = offsets[1:, None] - 1 - back
    tails = np.minimum.accumulate(values[np.where(inside, index, 0)] if len(values) else np.empty(index.shape), axis=1)
    lowest[index[inside]] = tails[inside]
    return lowest


def gate(entropy: np.ndarray, normaliser: float, constants: Weights) -> np.ndarray:
    """omega = clip(1 - gamma H / M, floor, 1) (2605.13255, Eq. 6): entropy float32 [N] nats, M in nats -> float32 [N].

    Raises ValueError unless M is a positive number.
    """
    if not 0 < normaliser < np.inf:
        raise ValueError(f"normaliser: {normaliser}, expected a positive number of nats")
    omega = np.multiply(entropy, np.float32(-constants.gamma / normaliser))
    omega += np.float32(1)
    return np.clip(omega, np.float32(constants.floor), np.float32(1), out=omega)


def magnitude(
    teacher_logprobs: np.ndarray, student_logprobs: np.ndarray, offsets: np.ndarray, advantage: np.ndarray, epsilon: float
) -> np.ndarray:
    """w = clip(exp(D (log p_T - log p_S)), 1 - eps, 1 + eps), D = sign of the row's advantage (2605.13255, Eq. 2).

    Ragged log-probs float32 [N] nats, advantage float32 [R] -> float32 [N].
    """
    exponent = teacher_logprobs - student_logprobs
    exponent *= np.repeat(np.sign(advantage), np.diff(offsets))
    # A clip before exp would save nothing and would round differently from the torch twin. The clip also takes inf.
    with np.errstate(over="ignore"):
        np.exp(exponent, out=exponent)
    return np.clip(exponent, np.float32(1 - epsilon), np.float32(1 + epsilon), out=exponent)


# ---- regimes, spans, statistics ----------------------------------------------------------------------------------------


def threshold_scale(peak: Any, vocab_size: int, settings: Profile, constants: Weights) -> Any:
    """What entropies are divided by before they meet the thresholds, in nats: log V, or M of Eq. 5 (`batch_max`).

    peak: the largest entropy of a round in nats, or one per round [K]; the result for `batch_max` has the same shape.
    """
    return log(vocab_size) if settings.normaliser == "log_vocab" else normaliser(peak, constants)


def row_statistics(values: np.ndarray, offsets: np.ndarray) -> RowStatistics:
    """Mean, median, 90th percentile and maximum of each row of ragged float32 values, which are not negative."""
    ordered = ragged.sorted_rows(values, offsets)
    sums = ragged.reduce_rows(np.add, values, offsets, np.float64)
    mean = (sums / np.maximum(np.diff(offsets), 1)).astype(np.float32)
    return RowStatistics(mean, *(ragged.row_quantile(ordered, offsets, q) for q in (0.5, 0.9, 1.0)))


def regimes(
    entropy: np.ndarray, lookahead: np.ndarray, offsets: np.ndarray, scale: float | np.ndarray, settings: Profile
) -> np.ndarray:
    """Regime of each token (2605.13255, section 5.5): ragged entropy and lookahead float32 [N] nats -> int8 [N].

    With h = entropy / scale and h_cl = lookahead / scale: 0 lock h <= tau_low; 3 fork h, h_cl >= tau_high; 2 pivot h >= tau_high
    and h_cl <= tau_low; 1 mid otherwise. scale in nats, one or per row [R]; the code multiplies the thresholds by it instead.
    Raises ValueError where tau_low is not below tau_high.
    """
    if settings.tau_low >= settings.tau_high:
        raise ValueError(f"tau_low: {settings.tau_low}, expected below tau_high = {settings.tau_high}")
    low, high = (_threshold(tau, scale, offsets) for tau in (settings.tau_low, settings.tau_high))
    uncertain = entropy >= high
    codes = np.subtract(1, entropy <= low, dtype=np.int8)
    codes += uncertain & (lookahead <= low)
    codes += (uncertain & (lookahead >= high)).view(np.int8) << 1
    return codes


def regime_shares(codes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Share of each row's tokens in each regime: ragged int8 [N] -> float32 [R, 4], rows add up to 1; NaN for an empty row."""
    counts = [ragged.reduce_rows(np.add, codes == code, offsets, np.float32) for code in range(NUM_REGIMES)]
    return np.stack(counts, axis=1) / np.maximum(np.diff(offsets), 1).astype(np.float32)[:, None]


def spans(codes: np.ndarray, entropy: np.ndarray, offsets: np.ndarray) -> Spans:
    """Maximal runs of equal regimes within each row, with the mean and the peak of their entropies."""
    begins = np.empty(len(codes) + 1, bool)
    np.not_equal(codes[1:], codes[:-1], out=begins[1 : max(len(codes), 1)])
    begins[offsets] = True  # also N, the end of the last span
    edges = np.flatnonzero(begins)
    first, last = edges[:-1], edges[1:]
    span_offsets = np.searchsorted(edges, offsets)
    origin = np.repeat(offsets[:-1], np.diff(span_offsets))
    # Most spans are a few tokens long. There a running sum and integer maxima are twice as fast as float reduceat.
    total = np.concatenate([[0.0], np.cumsum(entropy, dtype=np.float64)])[edges]
    mean = (np.diff(total) / (last - first)).astype(np.float32)
    bits = np.maximum(entropy, np.float32(0)).view(np.int32)  # floats >= 0 order like their bits
    peak = (np.maximum.reduceat(bits, first) if len(first) else bits).view(np.float32)
    return Spans((first - origin).astype(np.int32), (last - origin).astype(np.int32), codes[first], mean, peak, span_offsets)


def _threshold(tau: float, scale: float | np.ndarray, offsets: np.ndarray) -> Any:
    """tau * scale in float32 nats: one number where the rows agree, else one per token."""
    nats = np.float32(tau) * np.asarray(scale, np.float32)
    if nats.ndim == 0 or (nats.size and (nats == nats[0]).all()):
        return nats.flat[0]
    return np.repeat(nats, np.diff(offsets))


def _joined(parts: list[Spans]) -> Spans:
    """The spans of all blocks, in order."""
    *fields, offsets = zip(*parts, strict=True)
    counts = np.concatenate([np.diff(part) for part in offsets])
    return Spans._make([*map(np.concatenate, fields), np.concatenate([[0], np.cumsum(counts)])])
