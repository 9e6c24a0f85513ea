"""Ragged arrays in numpy: checks, blocks of rows, reductions and quantiles by row. No loop runs over tokens or rows.

A ragged array is Arrow's list layout: flat `values` [N] and `offsets` int64 [R + 1] from 0 to N. Row r is
values[offsets[r]:offsets[r + 1]]; a row may be empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

BLOCK_TOKENS = 1 << 16  # a float32 block of 256 KiB stays in the second-level cache


def check(offsets: np.ndarray, **columns: np.ndarray) -> None:
    """Raise ValueError, naming the argument, unless offsets int64 [R + 1] and float32 columns [N] make finite ragged arrays."""
    if offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise ValueError("offsets: expected int64 [R + 1] that start at 0 and never fall")
    for name, values in columns.items():
        if values.dtype != np.float32 or values.shape != (offsets[-1],):
            raise ValueError(f"{name}: {values.dtype} {values.shape}, expected float32 ({offsets[-1]},)")
        if not np.isfinite(values.sum()):  # NaN and infinity both reach the sum, which takes a fifth of the time of a full check
            raise ValueError(f"{name}: NaN or infinity among the values")


def per_row(name: str, values: float | np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """One number for all rows, or one per row [R], as float32 [R].

    Raises ValueError that begins with `name`: another shape, or NaN or infinity for a row that has tokens.
    """
    rows = len(offsets) - 1
    array = np.asarray(values, np.float32)
    if array.ndim and array.shape != (rows,):
        raise ValueError(f"{name}: shape {array.shape}, expected one number or one per row [{rows}]")
    array = np.broadcast_to(array, (rows,))
    if not np.isfinite(array[np.diff(offsets) > 0]).all():
        raise ValueError(f"{name}: a row with tokens has NaN or infinity")
    return array


def blocks(offsets: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Whole rows of about BLOCK_TOKENS tokens together: slice of rows, slice of tokens, offsets within the block."""
    inner = np.searchsorted(offsets, np.arange(BLOCK_TOKENS, offsets[-1], BLOCK_TOKENS), side="right") - 1
    cuts = np.unique(np.concatenate([[0], inner, [len(offsets) - 1]]))
    cuts = cuts if len(cuts) > 1 else np.array([0, 0])  # no row at all is one empty block
    for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        local = offsets[first : last + 1] - offsets[first]
        yield slice(first, last), slice(int(offsets[first]), int(offsets[last])), local


def reduce_rows(ufunc: np.ufunc, values: np.ndarray, offsets: np.ndarray, dtype: Any) -> np.ndarray:
    """`ufunc` over the values of each row: ragged [N] -> [R] of dtype, NaN for an empty row."""
    known = offsets[1:] > offsets[:-1]
    result = np.full(len(known), np.nan, dtype)
    if known.any():  # for an empty row reduceat alone would return a value of the next row
        result[known] = ufunc.reduceat(values, offsets[:-1][known], dtype=dtype)
    return result


def sorted_rows(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Values of each row in ascending order: ragged float32 [N] -> [N]. A value below zero, which only rounding makes, is zero.

    One sort serves all rows. Its key is the row number above the bits of the value: floats >= 0 order like their bits.
    Sorting padded rows, or rows grouped by length, was as fast and took more code.
    """
    lengths = np.diff(offsets)
    keys = np.repeat(np.arange(len(lengths), dtype=np.uint64) << np.uint64(32), lengths)
    keys |= np.maximum(values, np.float32(0)).view(np.uint32)
    keys.sort()
    return keys.astype(np.uint32).view(np.float32)


def row_quantile(ordered: np.ndarray, offsets: np.ndarray, q: float) -> np.ndarray:
    """Quantile `q` of each row of ragged values that are sorted within rows -> float32 [R], NaN for an empty row.

    Values between two neighbours are interpolated linearly, as numpy does.
    """
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
