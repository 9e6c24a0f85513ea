"""JSONL files, plain or compressed: every line is checked when they are opened, then a row is read by its place in its file."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileSystem

from pipeline.config import Source
from pipeline.errors import SourceError
from pipeline.problems.problem import Numeral
from pipeline.problems.shape import LOOKED_AT, Look, Shape, carried, understand, value_at

NAMES = (".jsonl", ".ndjson", ".json")
_PACKED_NAMES = ("", ".gz", ".zst", ".bz2", ".lz4")
_EXPECTED = "One JSON object per line is expected"
CHANGED = "Put the old file back. The same command compares all rows before it goes on"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\x04\x22\x4d\x18": "lz4"}  # by the first bytes
_UNKNOWN = {b"\xfd7zXZ\x00": "xz", b"PK\x03\x04": "zip"}


@dataclass(frozen=True)
class Jsonl:
    """Rows of some files, one after the other. The rows themselves stay on disk.

    files: the path of each, and its compression, None for a plain one. spans: int64 [N, 3]. Each row has the number
    of its file, then offset and length of its line, in bytes of the unpacked file. marks: 8 bytes of hash of each line.
    """

    filesystem: FileSystem
    files: list[tuple[str, str | None]]
    spans: np.ndarray
    marks: bytes
    fingerprint: str
    total: int
    shape: Shape

    def __len__(self) -> int:
        return len(self.spans)

    def carried(self) -> str:
        """Hash of the columns that are only carried: none, since `fingerprint` has whole lines."""
        return ""

    def read(self, indices: Sequence[int], _others: bool = True, /) -> list[dict[str, Any]]:
        """Rows in the order asked. Raises SourceError for a row that is not what it was when the file was opened."""
        rows: list[dict[str, Any]] = [{}] * len(indices)
        wanted = self.spans[np.asarray(indices, np.int64)]
        for number in np.unique(wanted[:, 0]).tolist():
            path, codec = self.files[number]
            places = np.flatnonzero(wanted[:, 0] == number)
            places = places[np.argsort(wanted[places, 1], kind="stable")]  # forward through the file
            try:
                lines = _lines_at(self.filesystem, path, codec, wanted[places, 1:].tolist())
            except OSError as error:
                raise SourceError(f"cannot be read: {error}", path, "The file has changed since it was opened") from error
            for place, line in zip(places.tolist(), lines, strict=True):
                where, at = f"{path}, byte {wanted[place, 1]}", 8 * int(indices[place])
                if _mark(line) != self.marks[at : at + 8]:
                    raise SourceError("the row is another one than when the file was opened", where, CHANGED)
                rows[place] = _row(line, where)
        return rows


def _lines_at(filesystem: FileSystem, path: str, codec: str | None, spans: list[list[int]]) -> list[bytes]:
    """The lines of a file at ascending places (offset, length). A compressed file is unpacked up to the last of them."""
    if codec is None:
        with filesystem.open_input_file(path) as file:
            return [file.read_at(length, offset) for offset, length in spans]
    lines, here, last = list[bytes](), 0, b""
    with filesystem.open_input_stream(path, compression=codec, buffer_size=1 << 20) as stream:
        for offset, length in spans:
            if offset + length > here:  # else the same line is asked for again
                while here < offset:
                    skipped = len(stream.read(min(offset - here, 1 << 20)))
                    if not skipped:
                        raise OSError("it ends before a row that it had")
                    here += skipped
                last = stream.read(length)
                here += len(last)
            lines.append(last)
    return lines


def is_named(path: str) -> bool:
    """Whether a path has the name of a JSONL file, which may be compressed."""
    return path.lower().endswith(tuple(f"{name}{packed}" for name in NAMES for packed in _PACKED_NAMES))


@dataclass
class _Scan:
    """What reading all lines finds: the places of the rows, their columns, the first rows, and a hash of the lines."""

    most: int
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)
    first: list[dict[str, Any]] = field(default_factory=list)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    marks: bytearray = field(default_factory=bytearray)
    beyond: int = 0

    def take(self, filesystem: FileSystem, path: str, number: int) -> str | None:
        """Read one file, and return its compression. Raises SourceError that names the line of the first bad row."""
        codec, offset = _codec(filesystem, path), 0
        with filesystem.open_input_stream(path, compression=codec) as stream, io.BufferedReader(stream, 1 << 20) as file:
            for count, line in enumerate(file, 1):
                if len(self.spans) == self.most:  # only counted, so that the cap can be said
                    self.beyond += bool(line.strip())
                    continue
                start = len(_BYTE_ORDER_MARK) if count == 1 and line.startswith(_BYTE_ORDER_MARK) else 0
                if line[start:].strip():
                    row = _row(line[start:], f"{path}:{count}")
                    self.columns |= dict.fromkeys(row)
                    self.first += [row] if len(self.first) < LOOKED_AT else []
                    self.digest.update(line)
                    self.marks += _mark(line[start:])
                    self.spans.append((number, offset + start, len(line) - start))
                offset += len(line)
        return codec


def open_jsonl(source: Source, filesystem: FileSystem, paths: list[str], look: bool = True) -> Jsonl:
    """The first `source.size` rows of some files. Raises SourceError that names the file, and the line of the first bad row."""
    scan, files = _Scan(source.size), list[tuple[str, str | None]]()
    for number, path in enumerate(paths):
        try:
            files.append((path, scan.take(filesystem, path, number)))
        except (OSError, pa.ArrowException) as error:
            remedy = "Check source.uri and the file's permissions; it may be cut short"
            raise SourceError(f"cannot be read: {error}", path, remedy) from error
    where = paths[0] if len(paths) == 1 else source.uri
    if not scan.spans:
        raise SourceError("is empty", where, _EXPECTED)
    if len(scan.spans) == 1 and where.endswith(".json"):
        _refuse_document(source, where, scan.first[0])
    names = list(scan.columns)
    shape = understand(source, Look(names, scan.first, where), look)
    shape = carried(names, shape, source, where)
    spans = np.array(scan.spans, np.int64)
    return Jsonl(filesystem, files, spans, bytes(scan.marks), scan.digest.hexdigest()[:16], len(spans) + scan.beyond, shape)


def _mark(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=8).digest()


def _codec(filesystem: FileSystem, path: str) -> str | None:
    """The compression of a file by its first bytes, whatever its name is. Raises SourceError for one that is not read."""
    with filesystem.open_input_stream(path, compression=None) as stream:
        first = stream.read(8)
    for mark, name in _UNKNOWN.items():
        if first.startswith(mark):
            raise SourceError(f"is compressed with {name}", path, "Unpack it, or compress it with gzip, zstd, bzip2 or lz4")
    return next((name for mark, name in _CODECS.items() if first.startswith(mark)), None)


def _refuse_document(source: Source, path: str, row: dict[str, Any]) -> None:
    """Raise SourceError for a file that is one JSON document of columns, such as pandas writes: it is no single problem."""
    cell = value_at(row, source.problem)
    if isinstance(cell, dict) or (isinstance(cell, list) and not all(isinstance(turn, dict) for turn in cell)):
        what = f"is one JSON document whose '{source.problem}' holds a {type(cell).__name__}, not one row per line"
        raise SourceError(what, path, 'Write one object per line, with pandas: to_json(path, orient="records", lines=True)')


class _TwiceError(ValueError):
    """A name stands twice in one object of JSON."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises _TwiceError for a name that stands twice: one of its values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return found


def _row(line: bytes, where: str) -> dict[str, Any]:
    """One JSON object. A number becomes the text in the file."""
    try:
        text = line.decode("utf-8")
        row = json.loads(text, parse_int=Numeral, parse_float=Numeral, object_pairs_hook=_object)
    except _TwiceError as error:
        raise SourceError(f"malformed JSON: '{error}' stands twice in one object", where, _EXPECTED) from error
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text (byte {error.start + 1} of the line)"
        raise SourceError(what, where, "Convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        raise SourceError(f"malformed JSON: {error.msg} at column {error.colno}", where, _EXPECTED) from error
    except RecursionError as error:
        raise SourceError("malformed JSON: nested too deeply", where, _EXPECTED) from error
    if not isinstance(row, dict):
        raise SourceError(f"holds a JSON {type(row).__name__}, not an object", where, _EXPECTED)
    return row
