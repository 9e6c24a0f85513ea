"""A source of problems gives rows by index, read as problems, and `open_source` opens every kind of source.

Opening a source reads it once from end to end, so a broken line stops a run before it costs anything. After that a source reads
only the rows that are asked for. A source can be pickled, so that each Ray task reads its own rows.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.config import Source
from pipeline.contract import Reject
from pipeline.digest import digest
from pipeline.errors import EgrsdError, SettingError, SourceError, first_line, nearest
from pipeline.notices import NOTICE_S, late
from pipeline.problems import gym, hub, jsonl, parquet, tiny, worlds
from pipeline.problems.problem import Problem, read_problem
from pipeline.problems.shape import Shape
from pipeline.problems.splits import files_below, is_one_file

_MOST_MADE = 10**9
_MADE = ("reasoning-gym", worlds.KIND)  # kinds that make problems, and read no file


class Rows(Protocol):
    """Raw rows by index, which every kind of source offers."""

    @property
    def shape(self) -> Shape:
        """Which column holds what."""

    @property
    def fingerprint(self) -> str:
        """Hash of the rows, or of what generates them."""

    @property
    def total(self) -> int:
        """Rows of the source, also those beyond `source.size`."""

    def __len__(self) -> int: ...

    def carried(self) -> str:
        """Hash of the columns that are only carried, as far as `fingerprint` leaves them out. It may take long."""

    def read(self, indices: Sequence[int], others: bool = True, /) -> list[dict[str, Any]]:
        """Raw rows in the order asked. Raises SourceError when the source cannot be read any more.

        others: whether the columns that are only carried are wanted too. They may be large.
        """


class ProblemSet:
    """Problems of one source by index.

    `fingerprint` is a hash of their content. For a generated task it is a hash of the settings and the first problems.
    Raises SettingError when `source.skip` leaves no row.
    """

    def __init__(self, source: Source, rows: Rows) -> None:
        if source.skip >= len(rows) > 0:
            raise SettingError(
                f"{source.uri} has {len(rows)} rows, and none is behind the first {source.skip}", "source.skip", "Lower it"
            )
        self.source, self.size, self.fingerprint = source, min(len(rows) - source.skip, source.size), rows.fingerprint
        self.total, self.shape, self._rows = rows.total, rows.shape, rows
        self._solved = True

    def __len__(self) -> int:
        return self.size

    def rows(self, indices: Sequence[int], others: bool = True) -> list[Problem]:
        """One Problem per index, in the order asked. IndexError outside [0, len), SourceError when the source cannot be read.

        others: whether a problem has the other columns of its row, `extra`.
        """
        wrong = [i for i in indices if not 0 <= i < self.size]
        if wrong:
            raise IndexError(f"row {wrong[0]} of a source of {self.size}")
        places = [index + self.source.skip for index in indices] if self.source.skip else indices
        raw, shape = self._rows.read(places, others), self.shape if others else replace(self.shape, other=())
        found = [read_problem(int(index), row, shape, self.source) for index, row in zip(indices, raw, strict=True)]
        return found if self._solved else [_unsolved(row, shape.answer) for row in found]

    def carried(self) -> str:
        """Hash of the columns that rewards may want and that `fingerprint` leaves out; "" for none. It may take long."""
        uri = self.source.uri
        with late(f"columns {uri}", f"the other columns of {uri} have been read for {NOTICE_S:g} s so far."):
            return self._rows.carried()

    def without_solutions(self) -> ProblemSet:
        """The same problems for an evaluation, which reads no solution: a row without one, or a source without any, is asked."""
        self.shape, self._solved = replace(self.shape, lacks=""), False
        return self

    def cautions(self, held_out: Source | None = None) -> list[str]:
        """What a person should know about figures on this source: rows that are not used, answers that may differ.

        held_out: the source of the evaluation. Rows that it takes from the same file are no rows to train on.
        """
        notes = []
        if skip := self.source.skip:
            notes.append(f"rows {skip} to {skip + self.size - 1} of {self.total} are used, counted from 0 (skip, size)")
        elif self.size < self.total:
            apart = held_out.skip if held_out is not None and held_out.uri == self.source.uri else 0
            more = f"the evaluation asks rows from {apart} on" if apart else f"set its size to {self.total} for all of them"
            notes.append(f"the first {self.size} of {self.total} rows are used: {more}")
        kind, _, task = self.source.uri.partition(":")
        notes += self.shape.found
        first = self.rows(range(min(8, self.size))) if kind == "reasoning-gym" else []
        if first and (said := gym.caution(task, [row.answer or "" for row in first])):
            notes.append(said)
        return [f"note: {self.source.uri}: {text}" for text in notes]


def _unsolved(row: Problem, answer: str) -> Problem:
    """A row for somebody who reads no solutions. `answer` is the column of answers."""
    if row.reject != Reject.MISSING_SOLUTION:
        return row
    if row.answer is None:
        return replace(row, reject=Reject.MISSING_ANSWER, detail=f"column '{answer}' is empty")
    return replace(row, reject=None, detail="")


def open_source(source: Source, look: bool = True, setting: str = "source") -> ProblemSet:
    """The problems behind `source.uri`, with every check that needs no model. `setting` is the section that remedies name.

    look: whether a column that is not there may be found by looking at the first rows. Raises SourceError, with file and line,
    for a source that is unreadable, malformed, empty or without a column. Raises SettingError for an option that the kind of
    source does not know.
    """
    with _told_of(setting):
        return _open(source, look)


def look_for(source: Source, setting: str = "source") -> None:
    """Look for the files of a source, which takes no time, and read none. Raises SourceError when there is none."""
    with _told_of(setting):
        if source.uri.strip():
            stamps(source)


@contextlib.contextmanager
def _told_of(setting: str) -> Iterator[None]:
    """Errors of a block name the settings of section `setting` in the place of those of `source`."""
    try:
        yield
    except (SourceError, SettingError) as error:
        if setting == "source":
            raise
        what, where, remedy = (re.sub(r"(?<![\w.])source\.(?=[a-z])", f"{setting}.", text) for text in error.args)
        raise type(error)(what, where, remedy) from error


def _open(source: Source, look: bool) -> ProblemSet:
    """The problems behind `source.uri`."""
    for name in ("uri", "problem", "answer"):
        if not getattr(source, name).strip():
            raise SettingError("is empty", f"source.{name}", "Name a file, dataset or task" if name == "uri" else "Name a column")
    kind, _, name = source.uri.partition(":")
    if source.response and (source.uri == "tiny-arithmetic" or kind in _MADE):
        raise SettingError(f"{source.uri} makes problems, and brings no traces", "source.response", "Name a file in source.uri")
    if source.skip and (source.uri == "tiny-arithmetic" or kind == "reasoning-gym"):
        raise SettingError(f"{source.uri} makes problems, and has no rows to pass over", "source.skip", "Choose a split instead")
    if source.uri == "tiny-arithmetic":
        _check_options(source, ())
        return _generated(source, partial(tiny.problem, seed=source.seed, split=source.split))
    if kind == worlds.KIND:
        _check_options(source, ())
        world = worlds.read_world(name)
        return _generated(source, partial(worlds.problem, seed=source.seed, split=source.split, world=world))
    if kind == "reasoning-gym":
        _check_options(source, gym.option_names(name))
        gym.check_options(name, source.options)
        make = partial(gym.problem, name, json.dumps(source.options, sort_keys=True), source.split, source.seed, source.size)
        return _generated(source, make)
    _check_options(source, hub.OPTIONS if kind == "datasets" else ())
    words = f"waiting for the problems of {source.uri}: they have been read for {NOTICE_S:g} s so far."
    with _reaching(source, "cannot be read"), late(f"source {source.uri}", words):
        wide = source.model_copy(update={"size": source.skip + source.size}) if source.skip else source
        rows = hub.open_hub(wide, name, look) if kind == "datasets" else _open_files(wide, look)
    return ProblemSet(source, rows)


@contextlib.contextmanager
def _reaching(source: Source, what: str) -> Iterator[None]:
    """Errors of files, and of the libraries behind fsspec, which have classes of their own, become a SourceError."""
    try:
        yield
    except EgrsdError:
        raise
    except Exception as error:
        if "://" not in source.uri and not isinstance(error, OSError):
            raise
        raise SourceError(f"{what}: {first_line(error)}", source.uri, "Check the network and the rights to read it") from error


def named(source: Source) -> str:
    """A source in few words, for a title: `gsm8k, split test`. A long path is cut at its front."""
    return in_words(source.uri, source.split)


def in_words(uri: str, split: str) -> str:
    """A source by its address and split. A single file has no splits, so none is named."""
    shown = uri if len(uri) <= 48 else "..." + uri[-45:]
    return shown if is_one_file(uri) else f"{shown}, split {split}"


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
    shape: Shape

    @property
    def total(self) -> int:
        """All rows: a task makes as many as are asked."""
        return self.size

    def __len__(self) -> int:
        return self.size

    def carried(self) -> str:
        """A task carries no columns."""
        return ""

    def read(self, indices: Sequence[int], _others: bool = True, /) -> list[dict[str, Any]]:
        """The rows at `indices`, in the order asked."""
        return [self.make(int(index)) for index in indices]


def _generated(source: Source, make: Callable[[int], Any]) -> ProblemSet:
    if source.size > _MOST_MADE:
        what = f"{source.uri} makes at most {_MOST_MADE} problems, whose order must fit into memory"
        raise SettingError(what, "source.size", "Lower it")
    settings = [source.uri, source.split, source.seed, source.options, [make(i) for i in range(min(8, source.size))]]
    shape = Shape("problem", "solution" if source.solution else "", "answer")
    return ProblemSet(source, _Generated(make, source.size, digest(settings), shape))


def _check_options(source: Source, known: Iterable[str]) -> None:
    """Raise SettingError for the first option that this kind of source does not know."""
    for name in source.options:
        if name not in known:
            hint = nearest(name, known, f"Known for {source.uri}: {', '.join(sorted(known)) or 'none'}")
            raise SettingError("unknown option", f"source.options.{name}", hint)


def _open_files(source: Source, look: bool) -> Rows:
    filesystem, path = _filesystem(source.uri)
    if "://" not in source.uri and hub.is_saved(path):
        return hub.open_hub(source, path, look)
    if files := files_below(source, filesystem, path):
        opening = jsonl.open_jsonl if jsonl.is_named(files[0]) else parquet.open_parquet
        return opening(source, filesystem, files, look)
    raise SourceError(
        "is no file, folder or kind of source that can be read",
        source.uri,
        "Give a .jsonl (or .jsonl.gz) or .parquet file, a folder or glob of either, datasets:NAME, reasoning-gym:TASK, "
        "tiny-arithmetic or tiny-worlds:DIALS",
    )


def stamps(source: Source) -> dict[str, list[int | None]]:
    """Size in bytes and time of change in nanoseconds of each file of a source, without reading them. Empty where none is known.

    The name of a file is the one below the source's folder, or below the part of its path that has no wildcard.
    Raises SourceError when the place does not answer, or a folder cannot be listed.
    """
    kind, _, name = source.uri.partition(":")
    if source.uri == "tiny-arithmetic" or kind in _MADE:
        return {}
    with (
        _reaching(source, "its files cannot be looked at"),
        late(f"files {source.uri}", f"waiting for the list of the files of {source.uri}: for {NOTICE_S:g} s so far."),
    ):
        return _stamps(source, kind, name)


def _stamps(source: Source, kind: str, name: str) -> dict[str, list[int | None]]:
    filesystem, path = _filesystem(name if kind == "datasets" else source.uri)
    if kind == "datasets" or ("://" not in source.uri and hub.is_saved(path)):
        infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    else:
        files = files_below(source, filesystem, path)
        infos = filesystem.get_file_info(files)
    return {_below(path, info.path): [info.size, info.mtime_ns] for info in infos if info.is_file}


def _below(path: str, file: str) -> str:
    """The part of a file's path that follows what it has in common with the path of its source. At least its name is left."""
    parts = file.split("/")
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(parts[:-1], path.rstrip("/").split("/"), strict=False))
    return "/".join(parts[len(list(alike)) :])


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
