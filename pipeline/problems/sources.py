"""Problems in: JSONL, Parquet, a `datasets` name or folder, a reasoning-gym task, the tiny arithmetic task.

`open_source` reads a file once from end to end (so a broken line stops a run before it costs anything), keeps only where its
rows lie, and hands out rows by index. A set pickles: Ray tasks read their own rows.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.config import Source
from pipeline.contract import Reject
from pipeline.errors import SettingError, SourceError
from pipeline.problems import gym, tiny
from pipeline.problems.answers import stated_answer


@dataclass(frozen=True)
class Problem:
    """One row of a source; with `reject` it lacks what the recipe needs, and `detail` says what."""

    index: int
    problem: str | None
    solution: str | None
    answer: str | None
    reject: Reject | None = None
    detail: str = ""


class ProblemSet(ABC):
    """Rows of one source by index. `fingerprint` hashes their content, or the settings and first rows of a generated task."""

    def __init__(self, source: Source, size: int, fingerprint: str) -> None:
        self.source, self.size, self.fingerprint = source, size, fingerprint
        self._fields = (source.problem, source.solution, source.answer)

    def __len__(self) -> int:
        return self.size

    def rows(self, indices: Sequence[int]) -> list[Problem]:
        """One Problem per index, in the order asked. IndexError outside [0, len), SourceError when the source cannot be read."""
        wrong = [i for i in indices if not 0 <= i < self.size]
        if wrong:
            raise IndexError(f"row {wrong[0]} of a source of {self.size}")
        return [_problem(int(index), row, *self._fields) for index, row in zip(indices, self._read(indices), strict=True)]

    def caution(self) -> str | None:
        """What to know before accuracies on this source are believed; None where nothing is known against them."""
        kind, _, task = self.source.uri.partition(":")
        first = self.rows(range(min(8, self.size))) if kind == "reasoning-gym" else []
        said = gym.caution(task, [row.answer or "" for row in first]) if first else None
        return said and f"note: {self.source.uri}: {said}"

    @abstractmethod
    def _read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Raw rows in the order asked."""


def open_source(source: Source) -> ProblemSet:
    """The problems behind `source.uri`, checked as far as can be told without a model.

    Raises SourceError (unreadable, malformed, empty, a missing column; names file and line) or SettingError (a task's option).
    """
    kind, _, name = source.uri.partition(":")
    if source.uri == "tiny-arithmetic":
        _check_options(source, ())
        return _Generated(source, partial(tiny.problem, seed=source.seed, split=source.split))
    if kind == "reasoning-gym":
        _check_options(source, gym.option_names(name))
        make = partial(gym.problem, name, json.dumps(source.options, sort_keys=True), source.split, source.seed, source.size)
        return _Generated(source, make)
    if kind == "datasets":
        return _open_hub(source, name)
    _check_options(source, ())
    filesystem, path = _filesystem(source.uri)
    if path.endswith((".jsonl", ".ndjson", ".json")):
        return _open_jsonl(source, filesystem, path)
    if files := _parquet_files(filesystem, path):
        return _open_parquet(source, filesystem, files)
    raise SourceError(
        "is no file, folder or kind of source that can be read",
        source.uri,
        "Give a .jsonl or .parquet file, a folder or glob of .parquet, datasets:NAME, reasoning-gym:TASK or tiny-arithmetic",
    )


def epoch_indices(size: int, seed: int, start: int, count: int) -> np.ndarray:
    """Positions start .. start + count of the endless shuffled order: int64 [count] in [0, size).

    Epoch e is the permutation of all rows seeded by (seed, e), so every row comes once per epoch and any position can be
    reached without a state (exact resume, across epoch boundaries too). ValueError for size < 1 or negative positions.
    """
    if size < 1 or start < 0 or count < 0:
        raise ValueError(f"no positions {start} .. {start + count} of an order over {size} rows")
    parts = [np.empty(0, np.int64)]
    while count > 0:
        epoch, offset = divmod(start, size)
        # RandomState: numpy promises that its stream never changes, which a resumed run relies on
        parts.append(np.random.RandomState([seed % 2**32, epoch % 2**32]).permutation(size)[offset : offset + count])
        start, count = start + len(parts[-1]), count - len(parts[-1])
    return np.concatenate(parts)


def _problem(index: int, row: dict[str, Any], problem: str, solution: str, answer: str) -> Problem:
    task, worked, target = _text(row.get(problem)), _text(row.get(solution)), _text(row.get(answer))
    if target is not None and (answer in (solution, "solution") or "\\boxed" in target or "####" in target):
        target = stated_answer(target)
    for value, column, reject in (
        (task, problem, Reject.MISSING_PROBLEM),
        (worked, solution, Reject.MISSING_SOLUTION),
        (target, answer, Reject.MISSING_ANSWER),
    ):
        if value is None and column:
            return Problem(index, task, worked, target, reject, _why_missing(row.get(column), column))
    return Problem(index, task, worked, target)


def _why_missing(value: Any, column: str) -> str:
    if isinstance(value, str) and value.strip():
        return f"column '{column}' holds no complete \\boxed{{...}} and no ####"
    if isinstance(value, (list, dict)):
        return f"column '{column}' holds a {type(value).__name__}, not text"
    return f"column '{column}' is empty"


def _text(value: Any) -> str | None:
    """A cell as text: 3 and 3.0 as "3"; None when there is nothing to read."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return None if value != value else str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or isinstance(value, (list, dict)) or not str(value).strip():
        return None
    return str(value).encode("utf-8", "replace").decode()  # half a surrogate pair, legal in JSON, is no text for Arrow


def _check_options(source: Source, known: Iterable[str]) -> None:
    """SettingError for the first option that this kind of source does not know."""
    for name in source.options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Known for {source.uri}: {', '.join(sorted(known)) or 'none'}"
            raise SettingError("unknown option", f"source.options.{name}", hint)


def _check_columns(source: Source, known: Iterable[str], where: str) -> None:
    """SourceError for the first of the three columns that no row has."""
    names = sorted(known)
    for role in ("problem", "solution", "answer"):
        column = getattr(source, role)
        if column and column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint = f"Set source.{role}={near[0]}?" if near else f"Set source.{role} to the column that holds it"
            raise SourceError(f"has no column '{column}'; there are: {', '.join(names)}", where, hint)


def _filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        return _fsspec_filesystem(uri, error)


def _fsspec_filesystem(uri: str, cause: Exception) -> tuple[pafs.FileSystem, str]:
    """For schemes that pyarrow does not speak itself (hf://, abfs:// ...) and fsspec may."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError, OSError) as error:
        raise SourceError(
            f"cannot be opened: {cause}; {error}", uri, "Use a local path, file://, s3://, gs:// or hf://"
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


# ---- JSONL ------------------------------------------------------------------------------------------------------------


class _Jsonl(ProblemSet):
    """Only the byte range of every row is in memory: `spans` int64 [N, 2], offset and length."""

    def __init__(self, source: Source, filesystem: pafs.FileSystem, path: str, spans: np.ndarray, fingerprint: str) -> None:
        super().__init__(source, len(spans), fingerprint)
        self._filesystem, self._path, self._spans = filesystem, path, spans

    def _read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{}] * len(indices)
        try:
            with self._filesystem.open_input_file(self._path) as file:
                for place in np.argsort([self._spans[i, 0] for i in indices]):  # forward through the file
                    offset, length = self._spans[indices[place]].tolist()
                    rows[place] = _json_row(file.read_at(length, offset), f"{self._path}, byte {offset}")
        except OSError as error:
            raise SourceError(f"cannot be read: {error}", self._path, "The file has changed since it was opened") from error
        return rows


def _open_jsonl(source: Source, filesystem: pafs.FileSystem, path: str) -> _Jsonl:
    spans, columns, digest, offset = [], set[str](), hashlib.sha256(), 0
    try:
        with filesystem.open_input_stream(path, compression=None) as stream, io.BufferedReader(stream, 1 << 20) as file:
            for number, line in enumerate(file, 1):
                start = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
                if line[start:].strip():
                    columns |= _json_row(line[start:], f"{path}:{number}").keys()
                    digest.update(line)
                    spans.append((offset + start, len(line) - start))
                offset += len(line)
                if len(spans) == source.size:
                    break
    except OSError as error:
        raise SourceError(f"cannot be read: {error}", path, "Check source.uri and the file's permissions") from error
    if not spans:
        raise SourceError("is empty", path, "One JSON object per line is expected")
    _check_columns(source, columns, path)
    return _Jsonl(source, filesystem, path, np.array(spans, np.int64), digest.hexdigest()[:16])


def _json_row(line: bytes, where: str) -> dict[str, Any]:
    """One JSON object. Numbers keep the text they were written with."""
    try:
        row = json.loads(line.decode("utf-8"), parse_int=str, parse_float=_number_text)
    except UnicodeDecodeError as error:
        raise SourceError(
            f"is not UTF-8 text (byte {error.start + 1} of the line)", where, "Convert the file to UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise SourceError(
            f"malformed JSON: {error.msg} at column {error.colno}", where, "One JSON object per line is expected"
        ) from error
    except RecursionError as error:
        raise SourceError("malformed JSON: nested too deeply", where, "One JSON object per line is expected") from error
    if not isinstance(row, dict):
        raise SourceError(f"holds a JSON {type(row).__name__}, not an object", where, "One JSON object per line is expected")
    return row


def _number_text(literal: str) -> str:
    return literal.removesuffix(".0")


# ---- Parquet and datasets ---------------------------------------------------------------------------------------------


class _Parquet(ProblemSet):
    """Row groups of the files one after the other: `groups` (file, row group), `ends` int64, rows up to and with each."""

    def __init__(
        self, source: Source, filesystem: pafs.FileSystem, groups: list[tuple[str, int]], ends: np.ndarray, fingerprint: str
    ) -> None:
        super().__init__(source, min(int(ends[-1]), source.size), fingerprint)
        self._filesystem, self._groups, self._ends = filesystem, groups, ends

    def _read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{}] * len(indices)
        wanted = np.asarray(indices, np.int64)
        group_of = np.searchsorted(self._ends, wanted, side="right")
        for group in np.unique(group_of).tolist():
            places = np.flatnonzero(group_of == group)
            first = self._ends[group - 1] if group else 0
            path, number = self._groups[group]
            with _parquet_file(self._filesystem, path) as file:
                table = _row_group(file, number, self._fields, path).take(wanted[places] - first)
            for place, row in zip(places.tolist(), table.to_pylist(), strict=True):
                rows[place] = row
        return rows


def _parquet_files(filesystem: pafs.FileSystem, path: str) -> list[str]:
    """The file itself, the .parquet files below a folder, or those a glob matches, sorted."""
    try:
        info = filesystem.get_file_info(path)
        if info.is_file:
            return [path] if path.endswith((".parquet", ".pq")) else []
        folder = info.type == pafs.FileType.Directory
        pattern = f"{path.rstrip('/')}/*.parquet" if folder else path
        if not folder and not any(sign in path for sign in "*?["):
            return []
        base = path if folder else pattern[: min(pattern.find(sign) for sign in "*?[" if sign in pattern)].rpartition("/")[0]
        found = filesystem.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
    except OSError as error:
        raise SourceError(f"cannot be listed: {error}", path, "Check source.uri and the rights to read it") from error
    return sorted(item.path for item in found if item.is_file and fnmatch.fnmatch(item.path, pattern))


def _open_parquet(source: Source, filesystem: pafs.FileSystem, files: list[str]) -> _Parquet:
    groups, ends, digest, rows = [], [], hashlib.sha256(), 0
    for path in files:
        with _parquet_file(filesystem, path) as file:
            _check_columns(source, file.schema_arrow.names, path)
            for number in range(file.num_row_groups):
                if rows >= source.size:
                    break
                table = _row_group(file, number, (source.problem, source.solution, source.answer), path)
                if len(table) == 0:
                    continue
                _hash_rows(digest, table)
                rows += len(table)
                groups.append((path, number))
                ends.append(rows)
    if not rows:
        raise SourceError(
            "is empty", files[0] if len(files) == 1 else source.uri, "A Parquet file with at least one row is expected"
        )
    return _Parquet(source, filesystem, groups, np.array(ends, np.int64), digest.hexdigest()[:16])


def _parquet_file(filesystem: pafs.FileSystem, path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(filesystem.open_input_file(path))
    except (OSError, pa.ArrowException) as error:
        raise SourceError(
            f"is not a readable Parquet file: {error}", path, "Check source.uri; the file may be cut short"
        ) from error


def _row_group(file: pq.ParquetFile, number: int, fields: Sequence[str], path: str) -> pa.Table:
    try:
        return file.read_row_group(number, columns=[name for name in dict.fromkeys(fields) if name])
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"row group {number} cannot be read: {error}", path, "The file is damaged: fetch it again") from error


def _hash_rows(digest: hashlib._Hash, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    plain = table.replace_schema_metadata(None)
    with pa.ipc.new_stream(sink, plain.schema) as stream:
        stream.write_table(plain)
    digest.update(sink.getvalue())


class _Hub(ProblemSet):
    """A map-style dataset of the `datasets` library, which keeps it on disk, memory-mapped."""

    def __init__(self, source: Source, data: Any, fingerprint: str) -> None:
        super().__init__(source, min(len(data), source.size), fingerprint)
        self._data = data

    def _read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        columns = self._data[[int(i) for i in indices]]
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _open_hub(source: Source, name: str) -> _Hub:
    _check_options(source, ("name", "data_dir", "data_files", "revision"))
    import datasets

    try:
        if os.path.isfile(os.path.join(name, "state.json")) or os.path.isfile(os.path.join(name, "dataset_dict.json")):
            data = datasets.load_from_disk(name)
            data = data[source.split] if isinstance(data, dict) else data
        else:
            data = datasets.load_dataset(name, split=source.split, **source.options)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        cause = str(error).strip().splitlines()
        raise SourceError(
            f"cannot be loaded: {cause[0] if cause else type(error).__name__}",
            f"{source.uri}, split '{source.split}'",
            "Check name and split; offline (HF_HUB_OFFLINE=1) only a local folder or the cache can be read",
        ) from error
    _check_columns(source, data.column_names, source.uri)
    if len(data) == 0:
        raise SourceError("is empty", source.uri, "A split with at least one row is expected")
    columns = [name for name in dict.fromkeys((source.problem, source.solution, source.answer)) if name]
    data, digest = data.select_columns(columns), hashlib.sha256()
    for table in data.select(range(min(len(data), source.size))).with_format("arrow").iter(1024):
        _hash_rows(digest, table)
    return _Hub(source, data, digest.hexdigest()[:16])


# ---- generated tasks --------------------------------------------------------------------------------------------------


class _Generated(ProblemSet):
    """A task that makes its problem from the index alone."""

    def __init__(self, source: Source, make: Callable[[int], Any]) -> None:
        self._make = make
        settings = [source.uri, source.split, source.seed, source.options, [make(i) for i in range(min(8, source.size))]]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        super().__init__(source, source.size, digest.hexdigest()[:16])
        self._fields = ("problem", source.solution and "solution", "answer")

    def _read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self._make(int(index)) for index in indices]
