"""Entropy profiles, regimes, spans and gates on ragged arrays (2605.13255, sections 3 and 5.5), numpy, on one core.

A ragged array is Arrow's list layout: flat `values` [N] and `offsets` int64 [R + 1] from 0 to N, row r being
values[offsets[r]:offsets[r + 1]]; rows may be empty. Entropies and log-probabilities are float32 nats. `profile` and `label` do
all the arithmetic of their stages in one call, in row-aligned blocks small enough for the cache: no loop runs over tokens or
rows. The other functions are their parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

# 0 lock, 1 mid, 2 pivot, 3 fork: the codes of `contract.Regime`, which stands above mathematics
NUM_REGIMES = 4
BLOCK_TOKENS = 1 << 16  # float32 blocks of 256 KiB stay in the second-level cache


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


class Profile(NamedTuple):
    """What the profile stage writes: lookahead float32 [N] nats, statistics of each row, shares float32 [R, 4] (NaN if empty)."""

    lookahead: np.ndarray
    statistics: RowStatistics
    shares: np.ndarray


class Labels(NamedTuple):
    """What the label stage writes: regime int8 [N], gate and weight float32 [N], spans."""

    regime: np.ndarray
    gate: np.ndarray
    weight: np.ndarray
    spans: Spans


def profile(
    entropy: np.ndarray, offsets: np.ndarray, *, window: int, scale: float | np.ndarray, tau_low: float, tau_high: float
) -> Profile:
    """Lookahead entropy, row statistics and regime shares of ragged teacher entropies.

    entropy float32 [N] nats, offsets int64 [R + 1], window W in tokens, scale in nats: what entropies are divided by before they
    meet the thresholds, one for all or one per row [R]. Raises ValueError on a malformed ragged array or a non-finite entropy.
    """
    check_ragged(offsets, entropy=entropy)
    scales = _per_row("scale", scale, offsets)
    lookahead, shares = np.empty_like(entropy), np.empty((len(scales), NUM_REGIMES), np.float32)
    statistics = RowStatistics(*np.empty((4, len(scales)), np.float32))
    for rows, tokens, local in _blocks(offsets):
        values = entropy[tokens]
        lookahead[tokens] = lowest = lookahead_min(values, local, window)
        shares[rows] = regime_shares(regimes(values, lowest, local, scales[rows], tau_low, tau_high), local)
        for whole, part in zip(statistics, row_statistics(values, local), strict=True):
            whole[rows] = part
    return Profile(lookahead, statistics, shares)


def label(
    entropy: np.ndarray,
    lookahead: np.ndarray,
    offsets: np.ndarray,
    advantage: np.ndarray,
    teacher_logprobs: np.ndarray,
    student_logprobs: np.ndarray,
    *,
    scale: float | np.ndarray,
    tau_low: float,
    tau_high: float,
    peak: float,
    gamma: float,
    floor: float,
    epsilon: float,
    gate_on_lookahead: bool = True,
) -> Labels:
    """Regimes, spans, gate (Eq. 6) and token weight A w omega (Eq. 7) of ragged signals.

    entropy, lookahead, teacher_logprobs, student_logprobs float32 [N] nats; offsets int64 [R + 1]; advantage [R]; scale as in
    `profile`; peak is M of Eq. 5 in nats, over whatever scope the caller took. The gate reads the lookahead entropy (CL-EGRSD)
    or the entropy itself (EGRSD). Raises ValueError on a malformed ragged array or a non-finite signal of a row with tokens.
    """
    check_ragged(
        offsets, entropy=entropy, lookahead=lookahead, teacher_logprobs=teacher_logprobs, student_logprobs=student_logprobs
    )
    advantages, scales = _per_row("advantage", advantage, offsets), _per_row("scale", scale, offsets)
    regime, omega, weight = np.empty(len(entropy), np.int8), np.empty_like(entropy), np.empty_like(entropy)
    parts = []
    for rows, tokens, local in _blocks(offsets):
        values, lowest = entropy[tokens], lookahead[tokens]
        regime[tokens] = codes = regimes(values, lowest, local, scales[rows], tau_low, tau_high)
        omega[tokens] = confidence = gate(lowest if gate_on_lookahead else values, peak, gamma, floor)
        factor = magnitude(teacher_logprobs[tokens], student_logprobs[tokens], local, advantages[rows], epsilon)
        factor *= confidence
        np.multiply(factor, np.repeat(advantages[rows], np.diff(local)), out=weight[tokens])
        parts.append(spans(codes, values, local))
    return Labels(regime, omega, weight, _joined(parts))


def lookahead_min(values: np.ndarray, offsets: np.ndarray, window: int) -> np.ndarray:
    """Least value among each token and the `window` tokens after it in its own row (Eq. 8): ragged float32 [N] -> [N]."""
    if window < 0:
        raise ValueError(f"window: {window}, expected 0 or more tokens")
    lowest = values.copy()
    for step in range(1, min(window, len(values) - 1) + 1):
        np.minimum(lowest[:-step], values[step:], out=lowest[:-step])
    # The last `window` tokens of a row have looked into the next one: they get the minimum up to their own row's end.
    lengths = np.diff(offsets)
    back = np.arange(min(window, int(lengths.max(initial=0))))
    inside = back < lengths[:, None]
    index = offsets[1:, None] - 1 - back
    tails = np.minimum.accumulate(values[np.where(inside, index, 0)] if len(values) else np.empty(index.shape), axis=1)
    lowest[index[inside]] = tails[inside]
    return lowest


def row_statistics(values: np.ndarray, offsets: np.ndarray) -> RowStatistics:
    """Mean, median, 90th percentile and maximum of each row of ragged float32 values, which are not negative.

    One sort serves all rows: a key is the row above the bits of the value, which for non-negative floats order like the value.
    (Sorting padded rows or rows grouped by length was as fast at more code.) Rounding below zero counts as zero.
    """
    lengths = np.diff(offsets)
    keys = np.repeat(np.arange(len(lengths), dtype=np.uint64) << np.uint64(32), lengths)
    keys |= np.maximum(values, np.float32(0)).view(np.uint32)
    keys.sort()
    ordered = keys.astype(np.uint32).view(np.float32)
    sums = _reduce_rows(np.add, values, offsets, np.float64)
    mean = (sums / np.maximum(lengths, 1)).astype(np.float32)
    return RowStatistics(mean, *(_quantile(ordered, offsets, q) for q in (0.5, 0.9, 1.0)))


def regimes(
    entropy: np.ndarray,
    lookahead: np.ndarray,
    offsets: np.ndarray,
    scale: float | np.ndarray,
    tau_low: float,
    tau_high: float,
) -> np.ndarray:
    """Regime of each token (2605.13255, section 5.5): ragged entropy and lookahead float32 [N] nats -> int8 [N].

    With h = entropy / scale and h_cl = lookahead / scale: 0 lock h <= tau_low; 3 fork h, h_cl >= tau_high; 2 pivot h >= tau_high
    and h_cl <= tau_low; 1 mid otherwise. scale in nats, one or per row [R]. The thresholds are multiplied instead.
    """
    if tau_low >= tau_high:
        raise ValueError(f"tau_low: {tau_low}, expected below tau_high = {tau_high}")
    low, high = (_thresholds(tau, scale, offsets) for tau in (tau_low, tau_high))
    uncertain = entropy >= high
    codes = np.subtract(1, entropy <= low, dtype=np.int8)
    codes += uncertain & (lookahead <= low)
    codes += (uncertain & (lookahead >= high)).view(np.int8) << 1
    return codes


def regime_shares(codes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Share of each row's tokens in each regime: ragged int8 [N] -> float32 [R, 4], rows add up to 1; NaN for an empty row."""
    counts = [_reduce_rows(np.add, codes == code, offsets, np.float32) for code in range(NUM_REGIMES)]
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
    # Most spans are a few tokens long: there a running sum and integer maxima (floats >= 0 order like their bits) beat
    # float reduceat by a factor of two.
    total = np.concatenate([[0.0], np.cumsum(entropy, dtype=np.float64)])[edges]
    mean = (np.diff(total) / (last - first)).astype(np.float32)
    bits = np.maximum(entropy, np.float32(0)).view(np.int32)
    peak = (np.maximum.reduceat(bits, first) if len(first) else bits).view(np.float32)
    return Spans((first - origin).astype(np.int32), (last - origin).astype(np.int32), codes[first], mean, peak, span_offsets)


def gate(entropy: np.ndarray, peak: float, gamma: float, floor: float) -> np.ndarray:
    """omega = clip(1 - gamma H / M, floor, 1) (2605.13255, Eq. 6), the twin of `egrsd.gate`: [N] nats -> [N] float32."""
    if not 0 < peak < np.inf:
        raise ValueError(f"peak: {peak}, expected a positive number of nats")
    omega = np.multiply(entropy, np.float32(-gamma / peak))
    omega += np.float32(1)
    return np.clip(omega, np.float32(floor), np.float32(1), out=omega)


def magnitude(
    teacher_logprobs: np.ndarray, student_logprobs: np.ndarray, offsets: np.ndarray, advantage: np.ndarray, epsilon: float
) -> np.ndarray:
    """w = clip(exp(D (log p_T - log p_S)), 1 - eps, 1 + eps), D = sign of the row's advantage (2605.13255, Eq. 2).

    Ragged log-probs float32 [N] nats, advantage [R] -> [N] float32, the twin of `egrsd.magnitude`.
    """
    exponent = teacher_logprobs - student_logprobs
    exponent *= np.repeat(np.sign(advantage), np.diff(offsets))
    # Clipping before exp would save nothing and round differently from the torch twin; overflow to inf is clipped.
    with np.errstate(over="ignore"):
        np.exp(exponent, out=exponent)
    return np.clip(exponent, np.float32(1 - epsilon), np.float32(1 + epsilon), out=exponent)


def _quantile(ordered: np.ndarray, offsets: np.ndarray, q: float) -> np.ndarray:
    """Quantile q of each row of ragged values sorted within rows, interpolated linearly as numpy does."""
    lengths = np.diff(offsets)
    place = q * np.maximum(lengths - 1, 0)
    below = place.astype(np.int64)
    above = np.minimum(below + 1, np.maximum(lengths - 1, 0))
    known = lengths > 0
    start = offsets[:-1]
    low, high = ordered[(start + below)[known]], ordered[(start + above)[known]]
    result = np.full(len(lengths), np.nan, np.float32)
    result[known] = low + (high - low) * (place - below)[known].astype(np.float32)
    return result


def _reduce_rows(ufunc: np.ufunc, values: np.ndarray, offsets: np.ndarray, dtype: Any) -> np.ndarray:
    """ufunc over each row -> [R] of dtype, NaN for an empty row (reduceat alone would return its neighbour's value)."""
    known = offsets[1:] > offsets[:-1]
    result = np.full(len(known), np.nan, dtype)
    if known.any():
        result[known] = ufunc.reduceat(values, offsets[:-1][known], dtype=dtype)
    return result


def _thresholds(tau: float, scale: float | np.ndarray, offsets: np.ndarray) -> Any:
    """tau * scale in float32 nats: one number where the rows agree, else one per token."""
    nats = np.float32(tau) * np.asarray(scale, np.float32)
    if nats.ndim == 0 or (nats.size and (nats == nats[0]).all()):
        return nats.flat[0]
    return np.repeat(nats, np.diff(offsets))


def _blocks(offsets: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Whole rows of about BLOCK_TOKENS tokens together: slice of rows, slice of tokens, offsets within the block."""
    inner = np.searchsorted(offsets, np.arange(BLOCK_TOKENS, offsets[-1], BLOCK_TOKENS), side="right") - 1
    cuts = np.unique(np.concatenate([[0], inner, [len(offsets) - 1]]))
    cuts = cuts if len(cuts) > 1 else np.array([0, 0])  # no row at all is one empty block
    for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        local = offsets[first : last + 1] - offsets[first]
        yield slice(first, last), slice(int(offsets[first]), int(offsets[last])), local


def _joined(parts: list[Spans]) -> Spans:
    """The spans of all blocks, in order."""
    *fields, offsets = zip(*parts, strict=True)
    counts = np.concatenate([np.diff(part) for part in offsets])
    return Spans._make([*map(np.concatenate, fields), np.concatenate([[0], np.cumsum(counts)])])


def _per_row(name: str, values: float | np.ndarray, offsets: np.ndarray) -> np.ndarray:
    rows = len(offsets) - 1
    array = np.asarray(values, np.float32)
    if array.ndim and array.shape != (rows,):
        raise ValueError(f"{name}: shape {array.shape}, expected one number or one per row [{rows}]")
    array = np.broadcast_to(array, (rows,))
    if not np.isfinite(array[np.diff(offsets) > 0]).all():
        raise ValueError(f"{name}: a row with tokens has NaN or infinity")
    return array


def check_ragged(offsets: np.ndarray, **columns: np.ndarray) -> None:
    """Raise ValueError, naming the argument, unless offsets int64 [R + 1] and float32 columns [N] make finite ragged arrays."""
    if offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise ValueError("offsets: expected int64 [R + 1] that start at 0 and never fall")
    for name, values in columns.items():
        if values.dtype != np.float32 or values.shape != (offsets[-1],):
            raise ValueError(f"{name}: {values.dtype} {values.shape}, expected float32 ({offsets[-1]},)")
        if not np.isfinite(values.sum()):  # a fifth of the cost of looking at every value, and misses none
            raise ValueError(f"{name}: NaN or infinity among the values")
