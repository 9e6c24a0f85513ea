"""Parquet files, folders and globs, read by row group. Opening reads every group once, a later read only the groups it needs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from pipeline.config import Source
from pipeline.errors import SourceError
from pipeline.problems.jsonl import CHANGED
from pipeline.problems.shape import LOOKED_AT, ROLES, Look, Shape, carried, listed, missing, understand, writable

# Row groups (file, number, hash) that this process has read whole, with size and time of the file before. To hash a group takes
# longer than to read it, and it is read for every shard: its hash is taken again when the file has another time or size.
_SEEN: dict[tuple[str, int, str], tuple[int | None, int | None]] = {}


@dataclass(frozen=True)
class Parquet:
    """Rows of the row groups of all files, one after the other.

    groups: (file, number of the row group, hash of what is read of it).
    ends: int64, the number of rows up to and with each group.
    """

    filesystem: FileSystem
    groups: list[tuple[str, int, str]]
    ends: np.ndarray
    fingerprint: str
    total: int
    shape: Shape

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, indices: Sequence[int], others: bool = True) -> list[dict[str, Any]]:
        """Rows in the order asked. Raises SourceError for a row group that is not what it was when the file was opened."""
        rows: list[dict[str, Any]] = [{}] * len(indices)
        wanted = np.asarray(indices, np.int64)
        group_of = np.searchsorted(self.ends, wanted, side="right")
        for group in np.unique(group_of).tolist():
            places = np.flatnonzero(group_of == group)
            first = self.ends[group - 1] if group else 0
            path, number, mark = self.groups[group]
            stamp = _stamp(self.filesystem, path)
            with _opened(self.filesystem, path) as file:
                names = file.schema_arrow.names
                columns = (self.shape.columns if others else self.shape.roots)(names)
                if number >= file.num_row_groups or not set(columns) <= set(names):
                    raise SourceError("has other row groups than when it was opened", path, CHANGED)
                table = _row_group(file, number, columns, path)
            if _SEEN.get((path, number, mark)) != stamp or None in stamp:
                if _mark(table, self.shape.roots(names)) != mark:
                    raise SourceError(f"row group {number} is another one than when the file was opened", path, CHANGED)
                _SEEN[path, number, mark] = stamp
            for place, row in zip(places.tolist(), listed(table.take(wanted[places] - first), path), strict=True):
                rows[place] = row
        return rows

    def carried(self) -> str:
        """Hash of the columns that are only carried, which `fingerprint` leaves out. Empty without such columns."""
        digest, any_column = hashlib.sha256(), False
        for path, number, _ in self.groups:
            with _opened(self.filesystem, path) as file:
                names = file.schema_arrow.names
                own = set(self.shape.roots(names))
                if columns := [name for name in self.shape.columns(names) if name not in own]:
                    hash_rows(digest, _row_group(file, number, columns, path))
                    any_column = True
        return digest.hexdigest()[:16] if any_column else ""


def open_parquet(source: Source, filesystem: FileSystem, files: list[str], look: bool = True) -> Parquet:
    """The row groups of `files` that hold the first `source.size` rows. Raises SourceError that names the file."""
    groups, ends, digest, rows, total = [], [], hashlib.sha256(), 0, 0
    shape = _shape(source, filesystem, files[0], look)
    for path in files:
        stamp = _stamp(filesystem, path)
        with _opened(filesystem, path) as file:
            total += file.metadata.num_rows
            columns = shape.roots(file.schema_arrow.names)
            _check(source, shape, file.schema_arrow.names, path)
            for number in range(file.num_row_groups):
                if rows >= source.size:
                    break
                table = _row_group(file, number, columns, path)
                if len(table) == 0:
                    continue
                hash_rows(digest, table)
                rows += len(table)
                groups.append((path, number, _mark(table, columns)))
                _SEEN[groups[-1]] = stamp
                ends.append(rows)
    if not rows:
        where = files[0] if len(files) == 1 else source.uri
        raise SourceError("is empty", where, "A Parquet file with at least one row is expected")
    return Parquet(filesystem, groups, np.array(ends, np.int64), digest.hexdigest()[:16], total, shape)


def _shape(source: Source, filesystem: FileSystem, path: str, look: bool) -> Shape:
    """What the first rows of the first file tell of the source's columns."""
    with _opened(filesystem, path) as file:
        names, first = file.schema_arrow.names, list[dict[str, Any]]()
        _refuse_twice(names, path)
        plain = writable(file.schema_arrow)
        for number in range(file.num_row_groups):
            if len(first) < LOOKED_AT:
                first += listed(_row_group(file, number, plain, path).slice(0, LOOKED_AT - len(first)), path)
        shape = understand(source, Look(names, first, path), look)
        return carried(plain, shape, source, path)


def _check(source: Source, shape: Shape, names: list[str], path: str) -> None:
    """Raise SourceError when one of several files lacks a column that the first one has."""
    _refuse_twice(names, path)
    for role in (*ROLES, "teacher"):
        column = getattr(shape, role)
        if column and column not in names and column.partition(".")[0] not in names:
            raise missing(source.model_copy(update={role: column}), role, Look(names, (), path))


def _stamp(filesystem: FileSystem, path: str) -> tuple[int | None, int | None]:
    """Size of a file in bytes, and its time of change in nanoseconds, as far as they are known."""
    info = filesystem.get_file_info(path)
    return info.size, info.mtime_ns


def _mark(table: pa.Table, columns: list[str]) -> str:
    """Hash of some columns of a row group, whatever else was read with them."""
    digest = hashlib.blake2b(digest_size=8)
    hash_rows(digest, table.select(columns).combine_chunks())
    return digest.hexdigest()


def _refuse_twice(names: list[str], path: str) -> None:
    """Raise SourceError for two columns of one name: one of them would be lost."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SourceError(f"has two columns '{twice}'", path, "Write the file again with one of them")


def hash_rows(digest: hashlib._Hash | hashlib.blake2b, table: pa.Table) -> None:
    """Add the rows of a table, with the names and types of its columns, to a hash."""
    sink = pa.BufferOutputStream()
    plain = table.replace_schema_metadata(None)
    with pa.ipc.new_stream(sink, plain.schema) as stream:
        stream.write_table(plain)
    digest.update(sink.getvalue())


def _opened(filesystem: FileSystem, path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(filesystem.open_input_file(path))
    except (OSError, pa.ArrowException) as error:
        remedy = "Check source.uri; the file may be cut short"
        raise SourceError(f"is not a readable Parquet file: {error}", path, remedy) from error


def _row_group(file: pq.ParquetFile, number: int, columns: list[str], path: str) -> pa.Table:
    try:
        return _plain_text(file.read_row_group(number, columns=columns))
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"row group {number} cannot be read: {error}", path, "The file is damaged: fetch it again") from error


def _plain_text(table: pa.Table) -> pa.Table:
    """The table with views of text as plain text: Arrow cannot take single rows of a view."""
    plain = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    for place, field in enumerate(table.schema):
        if field.type in plain:
            table = table.set_column(place, field.name, table.column(place).cast(plain[field.type]))
    return table
