"""Parquet files, folders and globs, read by row group. Opening reads every group once, a later read only the groups it needs."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileSystem, FileType

from pipeline.config import Source
from pipeline.errors import SourceError
from pipeline.problems.columns import check_columns, columns_of
from pipeline.problems.splits import files_of_split

_SIGNS = "*?["  # a path with one of these is a glob


@dataclass(frozen=True)
class Parquet:
    """Rows of the row groups of all files, one after the other.

    `groups`: (file, number of the row group). `ends`: int64, the number of rows up to and with each group.
    """

    filesystem: FileSystem
    groups: list[tuple[str, int]]
    ends: np.ndarray
    columns: list[str]
    fingerprint: str
    total: int

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Rows in the order asked. Raises SourceError when a row group cannot be read any more."""
        rows: list[dict[str, Any]] = [{}] * len(indices)
        wanted = np.asarray(indices, np.int64)
        group_of = np.searchsorted(self.ends, wanted, side="right")
        for group in np.unique(group_of).tolist():
            places = np.flatnonzero(group_of == group)
            first = self.ends[group - 1] if group else 0
            path, number = self.groups[group]
            with _opened(self.filesystem, path) as file:
                table = _row_group(file, number, self.columns, path).take(wanted[places] - first)
            for place, row in zip(places.tolist(), table.to_pylist(), strict=True):
                rows[place] = row
        return rows


def parquet_files(source: Source, filesystem: FileSystem, path: str) -> list[str]:
    """The file itself, or the files of split `source.split` below a folder or among those that a glob matches, sorted.

    A folder that exists is never taken for a glob, whatever its name is. Hidden files are passed over. The list may be empty.
    Raises SourceError when the folder cannot be listed, or lacks the split.
    """
    try:
        info = filesystem.get_file_info(path)
        if info.is_file:
            return [path] if path.endswith((".parquet", ".pq")) else []
        folder = info.type == FileType.Directory
        if not folder and not any(sign in path for sign in _SIGNS):
            return []
        base, pattern = (path.rstrip("/"), "*.parquet") if folder else _literal_base(filesystem, path)
        below = filesystem.get_file_info(FileSelector(base or "/", recursive=True, allow_not_found=True))
    except OSError as error:
        raise SourceError(f"cannot be listed: {error}", path, "Check source.uri and the rights to read it") from error
    names = {item.path: item.path.removeprefix(base).lstrip("/") for item in below if item.is_file}
    files = sorted(file for file, name in names.items() if fnmatch.fnmatchcase(name, pattern) and not _is_hidden(name))
    return files_of_split(source, base, files, chosen=not folder)


def _literal_base(filesystem: FileSystem, path: str) -> tuple[str, str]:
    """The folders at the front of a glob that exist as they are written, and the pattern below them."""
    *folders, last = path.split("/")
    base: list[str] = []
    for folder in folders:
        here = "/".join([*base, folder])
        if any(sign in folder for sign in _SIGNS) and filesystem.get_file_info(here).type != FileType.Directory:
            break
        base.append(folder)
    return "/".join(base), "/".join([*folders[len(base) :], last])


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def open_parquet(source: Source, filesystem: FileSystem, files: list[str]) -> Parquet:
    """The row groups of `files` that hold the first `source.size` rows. Raises SourceError that names the file."""
    groups, ends, digest, rows, columns, total = [], [], hashlib.sha256(), 0, columns_of(source), 0
    for path in files:
        with _opened(filesystem, path) as file:
            total += file.metadata.num_rows
            check_columns(source, file.schema_arrow.names, path)
            for number in range(file.num_row_groups):
                if rows >= source.size:
                    break
                table = _row_group(file, number, columns, path)
                if len(table) == 0:
                    continue
                hash_rows(digest, table)
                rows += len(table)
                groups.append((path, number))
                ends.append(rows)
    if not rows:
        where = files[0] if len(files) == 1 else source.uri
        raise SourceError("is empty", where, "A Parquet file with at least one row is expected")
    return Parquet(filesystem, groups, np.array(ends, np.int64), columns, digest.hexdigest()[:16], total)


def hash_rows(digest: hashlib._Hash, table: pa.Table) -> None:
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
