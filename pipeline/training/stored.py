"""A round's traces on local disk: values of every token in files, a few numbers of every trace in memory.

A step reads the rows of its minibatch alone, so memory holds one shard while a round is read, and one minibatch while it trains.
Order and rows are those of the whole round in memory: `batches.steps` needs no more than the number of traces.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.errors import StoreError, TrainingError
from pipeline.store.files import NO_SPACE
from pipeline.training.batches import SIGNALS, RoundTable, Traces, check_ids, usable

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config import Objective


@dataclass(frozen=True)
class StoredRound:
    """A committed round whose shards are read one by one. `shards` gives their training rows, in order.

    folder: a local folder for the files, which have no name there and end with the process. None: the system's own.
    comparable, answered: as in RoundTable.
    """

    number: int
    policy_version: int
    shards: Callable[[], Iterator[pa.Table]]
    folder: Path | None = None
    comparable: bool = True
    answered: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class StoredColumn:
    """As `RaggedColumn`, but `values` are in a file: of `dtype`, `width` numbers for each token, shape () or (K,)."""

    file: IO[bytes]
    dtype: np.dtype
    width: tuple[int, ...]
    starts: np.ndarray
    lengths: np.ndarray

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Values of `rows` [B], one row after the other -> [N] or [N, K], where N is the sum of their lengths."""
        lengths = self.lengths[rows]
        found: Any = np.empty((int(lengths.sum()), *self.width), self.dtype)
        view = memoryview(found).cast("B") if found.size else memoryview(b"")
        at, item = 0, self.dtype.itemsize * int(np.prod(self.width, dtype=int))
        for start, length in zip((self.starts[rows] * item).tolist(), (lengths * item).tolist(), strict=True):
            if os.preadv(self.file.fileno(), [view[at : at + length]], start) != length:
                raise OSError(f"{self.file.name}: a file of the round is shorter than it was written")
            at += length
        return found  # type: ignore[no-any-return]

    def row(self, row: int) -> np.ndarray:
        """The values of one row."""
        return self.take(np.array([row]))


class _File:
    """The file of one column while a round is read."""

    def __init__(self, folder: Path | None) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it ends with the traces
        self.dtype: np.dtype = np.dtype(np.float32)
        self.width: tuple[int, ...] | None = None

    def add(self, name: str, values: np.ndarray) -> None:
        """Append values. Raises TrainingError when they have another number for each token than those before."""
        if not len(values):
            return
        if self.width not in (None, values.shape[1:]):
            what = f"positions have {self.width} and {values.shape[1:]} of the teacher's most likely tokens"
            raise TrainingError(what, name, "Redo the score stage of this round")
        self.dtype, self.width = values.dtype, values.shape[1:]
        self.file.write(np.ascontiguousarray(values).data)

    def column(self, starts: np.ndarray, lengths: np.ndarray) -> StoredColumn:
        """The column, once every shard was added."""
        self.file.flush()
        return StoredColumn(self.file, self.dtype, self.width or (), starts, lengths)


def stored(data: StoredRound, max_staleness: int, constants: Objective, vocab_size: int) -> Traces:
    """The usable traces of a round, as `batches.usable` finds them in every shard, with their ids checked.

    Raises as both do, and StoreError when the disk is full.
    """
    names = ("prompt_tokens", "response_tokens", *SIGNALS, *constants.columns)
    try:
        files = {name: _File(data.folder) for name in names}
        parts = [_added(files, part) for part in _parts(data, max_staleness, constants, vocab_size)]
        ids = pa.concat_arrays([part[0] for part in parts])
        prompts, responses, advantage = (np.concatenate([part[i] for part in parts]) for i in (1, 2, 3))
        starts = np.cumsum(responses, dtype=np.int64) - responses
        columns = {name: files[name].column(starts, responses) for name in names if name != "prompt_tokens"}
        columns["prompt_tokens"] = files["prompt_tokens"].column(np.cumsum(prompts, dtype=np.int64) - prompts, prompts)
    except OSError as error:
        raise StoreError(f"cannot write the rows of round {data.number} ({error})", str(data.folder or ""), NO_SPACE) from error
    extra = {name: columns.pop(name) for name in constants.columns}
    rejected = sum(part[4] for part in parts)
    return Traces(data.number, ids, advantage=advantage, num_rejected=rejected, extra=extra, **columns)


def _parts(data: StoredRound, max_staleness: int, constants: Objective, vocab_size: int) -> Iterator[Traces]:
    for table in data.shards():
        part = usable(RoundTable(data.number, data.policy_version, table), max_staleness, constants)
        check_ids(part, vocab_size)
        yield part


def _added(files: dict[str, _File], part: Traces) -> tuple[pa.Array, np.ndarray, np.ndarray, np.ndarray, int]:
    """Append the traces of a shard to the files. Returns ids, lengths of prompt and response, advantages, number rejected."""
    rows = np.arange(len(part.advantage))
    for name, file in files.items():
        column = part.extra[name] if name in part.extra else getattr(part, name)
        file.add(name, column.take(rows))
    prompts, responses = (column.lengths.astype(np.int32) for column in (part.prompt_tokens, part.response_tokens))
    return pa.array(part.trace_ids, pa.string()), prompts, responses, part.advantage, part.num_rejected
