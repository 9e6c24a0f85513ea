"""Shards that are being computed, row by row (`Draft`) or as whole arrays (`Ragged`). Rejected rows keep their place."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import contract
from pipeline.contract import Stage


class Ragged:
    """A shard that is computed as whole ragged arrays. Only live rows, which are not rejected, take part."""

    def __init__(self, stage: Stage, *inputs: pa.Table) -> None:
        self.stage, self.keys = stage, inputs[0]["trace_id"]
        self.reasons = pc.coalesce(*(t["reject_reason"] for t in inputs))
        self.details = pc.coalesce(*(t["reject_detail"] for t in inputs))
        self.live = np.asarray(pc.is_null(self.reasons))

    def rows(self, column: pa.ChunkedArray) -> np.ndarray:
        """The values of a scalar column in the live rows."""
        return (column if self.live.all() else column.filter(pa.array(self.live))).to_numpy()

    def take(self, column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """A list column in the live rows, as flat values [N] and offsets int64 [R+1]."""
        return ragged(column if self.live.all() else column.filter(pa.array(self.live)))

    def scalars(self, values: np.ndarray) -> pa.Array:
        """A column with one value per live row, and null in the rejected rows."""
        out = np.zeros(len(self.live), values.dtype)
        out[self.live] = values
        return pa.array(out, mask=~self.live)

    def lists(self, values: np.ndarray | pa.Array, offsets: np.ndarray) -> pa.Array:
        """A column with one list per live row, and null in the rejected rows."""
        lengths = np.zeros(len(self.live), np.int32)
        lengths[self.live] = np.diff(offsets)
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int32)])
        flat = values if isinstance(values, pa.Array) else pa.array(values)
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat, mask=pa.array(~self.live))

    def table(self, columns: dict[str, pa.Array]) -> pa.Table:
        """The shard as a table, with its columns in the order of the contract."""
        fixed = {self.stage.key: self.keys, "reject_reason": self.reasons, "reject_detail": self.details}
        schema = contract.schema(self.stage)
        return pa.Table.from_arrays([{**fixed, **columns}[name] for name in schema.names], schema=schema)


def views(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The rows of a list column as numpy views of one flat array. A null row is an empty view."""
    flat, offsets = ragged(column)
    return [flat[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


def matrices(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The rows of a `[T, K]` column as arrays [T, K], views of one flat array. A null row is an empty array."""
    array = column.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
    inner = array.flatten()
    flat = inner.flatten().to_numpy()
    rows = flat.reshape(len(inner), len(flat) // max(1, len(inner)))
    return np.split(rows, np.cumsum(lengths)[:-1]) if len(lengths) else []


def ragged(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A list column as flat values [N] and offsets int64 [R+1]. Null rows are empty."""
    array = column.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
    return array.flatten().to_numpy(), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


class Draft:
    """A shard that is computed row by row: one dict of values per row, and the rows that were rejected."""

    def __init__(self, stage: Stage, keys: list[str]) -> None:
        self.stage, self.keys = stage, keys
        self.values: list[dict[str, Any]] = [{} for _ in keys]
        self.reasons: list[str | None] = [None] * len(keys)
        self.details: list[str | None] = [None] * len(keys)

    @classmethod
    def after(cls, stage: Stage, previous: pa.Table) -> Draft:
        """A draft for the rows of `previous`. Its rejected rows are rejected here too."""
        draft = cls(stage, previous["trace_id"].to_pylist())
        draft.reasons, draft.details = previous["reject_reason"].to_pylist(), previous["reject_detail"].to_pylist()
        return draft

    def live(self) -> list[int]:
        """Indices of the rows that are not rejected."""
        return [row for row, reason in enumerate(self.reasons) if reason is None]

    def reject(self, row: int, reason: str, detail: str | None) -> None:
        """Reject a row, unless it already has an earlier reason."""
        if self.reasons[row] is None:
            self.reasons[row], self.details[row] = str(reason), detail and clean(detail)[:500]

    def table(self, optional: Collection[str] = ()) -> pa.Table:
        """The shard as a table, with its columns in the order of the contract. Of optional ones it has those that are named."""
        schema = contract.schema(self.stage, optional)
        fixed = {self.stage.key: self.keys, "reject_reason": self.reasons, "reject_detail": self.details}
        arrays = [
            pa.array(fixed[f.name], f.type) if f.name in fixed else _column([v.get(f.name) for v in self.values], f.type)
            for f in schema
        ]
        return pa.Table.from_arrays(arrays, schema=schema)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """A column from Python values. Lists of numbers, and arrays [T, K], become one array, without a Python object per token."""
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    lengths = np.array([0 if v is None else len(v) for v in values], np.int64)
    inner = kind.value_type
    number = (inner.value_type if pa.types.is_list(inner) else inner).to_pandas_dtype()
    parts = [np.asarray(v, number) for v in values if v is not None and len(v)]
    flat = pa.array(np.concatenate([part.ravel() for part in parts]) if parts else np.empty(0, number))
    if pa.types.is_list(inner):
        ends = np.arange(int(lengths.sum()) + 1, dtype=np.int32) * (parts[0].shape[1] if parts else 0)
        flat = pa.ListArray.from_arrays(pa.array(ends), flat, type=inner)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, flat, type=kind, mask=pa.array([v is None for v in values], pa.bool_()))


def clean(text: str) -> str:
    """The text with its lone surrogates replaced, so that UTF-8 can hold it."""
    return text.encode("utf-8", "replace").decode("utf-8")
