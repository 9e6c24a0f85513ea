"""A source of problems gives rows by index, read as problems, and `open_source` opens every kind of source.

Opening a source reads it once from end to end, so a broken line stops a run before it costs anything. After that a source reads
only the rows that are asked for. A source can be pickled, so that each Ray task reads its own rows.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.config import Source
from pipeline.contract import Reject
from pipeline.digest import digest
from pipeline.errors import SettingError, SourceError, first_line, nearest
from pipeline.notices import NOTICE_S, late
from pipeline.problems import gym, hub, jsonl, parquet, tiny
from pipeline.problems.answers import stated_answer


@dataclass(frozen=True)
class Problem:
    """One row of a source. When the row lacks what the recipe needs, `reject` is set and `detail` says what is missing.

    teacher: the teacher that the row names. None in a run that names none.
    """

    index: int
    problem: str | None
    solution: str | None
    answer: str | None
    reject: Reject | None = None
    detail: str = ""
    teacher: str | None = None


class Rows(Protocol):
    """Raw rows by index, which every kind of source offers."""

    @property
    def fingerprint(self) -> str:
        """Hash of the rows, or of what generates them."""

    @property
    def total(self) -> int:
        """Rows of the source, also those beyond `source.size`."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Raw rows in the order asked. Raises SourceError when the source cannot be read any more."""


class ProblemSet:
    """Problems of one source by index.

    `fingerprint` is a hash of their content. For a generated task it is a hash of the settings and the first problems.
    """

    def __init__(self, source: Source, rows: Rows, columns: tuple[str, str, str]) -> None:
        """`columns` names the columns of problem, solution ("" where there is none) and answer in a raw row."""
        self.source, self.size, self.fingerprint = source, min(len(rows), source.size), rows.fingerprint
        self.total, self._rows, self._columns = rows.total, rows, columns

    def __len__(self) -> int:
        return self.size

    def rows(self, indices: Sequence[int]) -> list[Problem]:
        """One Problem per index, in the order asked. IndexError outside [0, len), SourceError when the source cannot be read."""
        wrong = [i for i in indices if not 0 <= i < self.size]
        if wrong:
            raise IndexError(f"row {wrong[0]} of a source of {self.size}")
        raw = self._rows.read(indices)
        problems = [_problem(int(index), row, *self._columns) for index, row in zip(indices, raw, strict=True)]
        if not (column := self.source.teacher):
            return problems
        return [replace(item, teacher=_text(row.get(column))) for item, row in zip(problems, raw, strict=True)]

    def cautions(self) -> list[str]:
        """What a person should know about figures on this source: rows that are not used, answers that may differ."""
        notes = []
        if self.size < self.total:
            notes.append(f"the first {self.size} of {self.total} rows are used: set its size to {self.total} for all of them")
        kind, _, task = self.source.uri.partition(":")
        first = self.rows(range(min(8, self.size))) if kind == "reasoning-gym" else []
        if first and (said := gym.caution(task, [row.answer or "" for row in first])):
            notes.append(said)
        return [f"note: {self.source.uri}: {text}" for text in notes]


def open_source(source: Source) -> ProblemSet:
    """The problems behind `source.uri`, with every check that needs no model.

    Raises SourceError, with file and line, for a source that is unreadable, malformed, empty or without a column. Raises
    SettingError for an option that the kind of source does not know.
    """
    for name in ("uri", "problem", "answer"):
        if not getattr(source, name).strip():
            raise SettingError("is empty", f"source.{name}", "Name a file, dataset or task" if name == "uri" else "Name a column")
    kind, _, name = source.uri.partition(":")
    if source.uri == "tiny-arithmetic":
        _check_options(source, ())
        return _generated(source, partial(tiny.problem, seed=source.seed, split=source.split))
    if kind == "reasoning-gym":
        _check_options(source, gym.option_names(name))
        gym.check_options(name, source.options)
        make = partial(gym.problem, name, json.dumps(source.options, sort_keys=True), source.split, source.seed, source.size)
        return _generated(source, make)
    _check_options(source, hub.OPTIONS if kind == "datasets" else ())
    words = f"waiting for the problems of {source.uri}: they have been read for {NOTICE_S:g} s so far."
    with late(f"source {source.uri}", words):
        rows = hub.open_hub(source, name) if kind == "datasets" else _open_files(source)
    return ProblemSet(source, rows, (source.problem, source.solution, source.answer))


def named(source: Source) -> str:
    """A source in few words, for a title: `data/mine.jsonl, split test`. A long path is cut at its front."""
    uri = source.uri if len(source.uri) <= 48 else "..." + source.uri[-45:]
    return f"{uri}, split {source.split}"


def epoch_indices(size: int, seed: int, start: int, count: int) -> np.ndarray:
    """Row numbers at positions start .. start + count of an endless shuffled order: int64 [count] in [0, size).

    Epoch e is the permutation of all rows seeded by (seed, e), so every row comes once per epoch. Any position can be computed
    without stored state, which makes resuming exact, also across epochs. Raises ValueError for size < 1 or negative positions.
    """
    if size < 1 or start < 0 or count < 0:
        raise ValueError(f"no positions {start} .. {start + count} of an order over {size} rows")
    parts = [np.empty(0, np.int64)]
    while count > 0:
        epoch, offset = divmod(start, size)
        # numpy promises that the stream of RandomState never changes, and a resumed run needs the same order
        parts.append(np.random.RandomState([seed % 2**32, epoch % 2**32]).permutation(size)[offset : offset + count])
        start, count = start + len(parts[-1]), count - len(parts[-1])
    return np.concatenate(parts)


@dataclass(frozen=True)
class _Generated:
    """Rows of a task that makes each problem from its index alone."""

    make: Callable[[int], Any]
    size: int
    fingerprint: str

    @property
    def total(self) -> int:
        """All rows: a task makes as many as are asked."""
        return self.size

    def __len__(self) -> int:
        return self.size

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows at `indices`, in the order asked."""
        return [self.make(int(index)) for index in indices]


def _generated(source: Source, make: Callable[[int], Any]) -> ProblemSet:
    settings = [source.uri, source.split, source.seed, source.options, [make(i) for i in range(min(8, source.size))]]
    rows = _Generated(make, source.size, digest(settings))
    return ProblemSet(source, rows, ("problem", "solution" if source.solution else "", "answer"))


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
    """A cell as text, with 3 and 3.0 both as "3". None for a cell that is empty or holds a list or an object."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return None if not math.isfinite(value) else str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or isinstance(value, (list, dict)) or not str(value).strip():
        return None
    return str(value).encode("utf-8", "replace").decode()  # JSON allows half a surrogate pair, Arrow does not


def _check_options(source: Source, known: Iterable[str]) -> None:
    """Raise SettingError for the first option that this kind of source does not know."""
    for name in source.options:
        if name not in known:
            hint = nearest(name, known, f"Known for {source.uri}: {', '.join(sorted(known)) or 'none'}")
            raise SettingError("unknown option", f"source.options.{name}", hint)


def _open_files(source: Source) -> Rows:
    filesystem, path = _filesystem(source.uri)
    if path.endswith((".jsonl", ".ndjson", ".json")):
        return jsonl.open_jsonl(source, filesystem, path)
    if "://" not in source.uri and hub.is_saved(path):
        return hub.open_hub(source, path)
    if files := parquet.parquet_files(source, filesystem, path):
        return parquet.open_parquet(source, filesystem, files)
    raise SourceError(
        "is no file, folder or kind of source that can be read",
        source.uri,
        "Give a .jsonl or .parquet file, a folder or glob of .parquet, datasets:NAME, reasoning-gym:TASK or tiny-arithmetic",
    )


def stamps(source: Source) -> dict[str, list[int | None]]:
    """Size in bytes and time of change in nanoseconds of each file of a source, without reading them. Empty where none is known.

    Raises SourceError when the place does not answer, or a folder cannot be listed.
    """
    kind, _, name = source.uri.partition(":")
    if source.uri == "tiny-arithmetic" or kind == "reasoning-gym":
        return {}
    try:
        with late(f"files {source.uri}", f"waiting for the list of the files of {source.uri}: for {NOTICE_S:g} s so far."):
            return _stamps(source, kind, name)
    except SourceError:
        raise
    except Exception as error:  # the libraries behind fsspec raise errors of their own
        what = f"its files cannot be looked at: {first_line(error)}"
        raise SourceError(what, source.uri, "Check the network and the rights to read it") from error


def _stamps(source: Source, kind: str, name: str) -> dict[str, list[int | None]]:
    filesystem, path = _filesystem(name if kind == "datasets" else source.uri)
    if kind == "datasets" or ("://" not in source.uri and hub.is_saved(path)):
        infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    else:
        files = [path] if path.endswith((".jsonl", ".ndjson", ".json")) else parquet.parquet_files(source, filesystem, path)
        infos = filesystem.get_file_info(files)
    return {info.path: [info.size, info.mtime_ns] for info in infos if info.is_file}


def _filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        return _fsspec_filesystem(uri, error)


def _fsspec_filesystem(uri: str, cause: Exception) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a scheme that pyarrow does not open itself (hf://, abfs://, ...), through fsspec."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError, OSError) as error:
        raise SourceError(
            f"cannot be opened: {cause}; {error}", uri, "Use a local path, file://, s3://, gs:// or hf://"
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path
