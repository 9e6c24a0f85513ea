"""JSONL files: every line is checked when the file is opened, then a row is read by its place in the file."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pyarrow.fs import FileSystem

from pipeline.config import Source
from pipeline.errors import SourceError
from pipeline.problems.columns import check_columns

_EXPECTED = "One JSON object per line is expected"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")  # gzip, zstd


@dataclass(frozen=True)
class Jsonl:
    """Rows of one file. `spans` int64 [N, 2] has the byte offset and length of each row. The rows themselves stay on disk."""

    filesystem: FileSystem
    path: str
    spans: np.ndarray
    fingerprint: str
    total: int

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Rows in the order asked. Raises SourceError when the file has changed and a row cannot be read any more."""
        rows: list[dict[str, Any]] = [{}] * len(indices)
        try:
            with self.filesystem.open_input_file(self.path) as file:
                for place in np.argsort([self.spans[i, 0] for i in indices]):  # forward through the file
                    offset, length = self.spans[indices[place]].tolist()
                    rows[place] = _row(file.read_at(length, offset), f"{self.path}, byte {offset}")
        except OSError as error:
            raise SourceError(f"cannot be read: {error}", self.path, "The file has changed since it was opened") from error
        return rows


def open_jsonl(source: Source, filesystem: FileSystem, path: str) -> Jsonl:
    """The first `source.size` rows of a file. Raises SourceError that names the line of the first bad row."""
    spans, columns, digest, offset, beyond = list[tuple[int, int]](), set[str](), hashlib.sha256(), 0, 0
    try:
        with filesystem.open_input_stream(path, compression=None) as stream, io.BufferedReader(stream, 1 << 20) as file:
            for number, line in enumerate(file, 1):
                if len(spans) == source.size:  # only counted, so that the cap can be said
                    beyond += bool(line.strip())
                    continue
                start = len(_BYTE_ORDER_MARK) if number == 1 and line.startswith(_BYTE_ORDER_MARK) else 0
                if line[start:].strip():
                    columns |= _row(line[start:], f"{path}:{number}").keys()
                    digest.update(line)
                    spans.append((offset + start, len(line) - start))
                offset += len(line)
    except OSError as error:
        raise SourceError(f"cannot be read: {error}", path, "Check source.uri and the file's permissions") from error
    if not spans:
        raise SourceError("is empty", path, _EXPECTED)
    if len(spans) == 1 and path.endswith(".json"):
        _refuse_document(source, filesystem, path, spans[0])
    check_columns(source, columns, path)
    return Jsonl(filesystem, path, np.array(spans, np.int64), digest.hexdigest()[:16], len(spans) + beyond)


def _refuse_document(source: Source, filesystem: FileSystem, path: str, span: tuple[int, int]) -> None:
    """Raise SourceError for a file that is one JSON document of columns, such as pandas writes: it is no single problem."""
    with filesystem.open_input_file(path) as file:
        row = _row(file.read_at(span[1], span[0]), path)
    if isinstance(row.get(source.problem), dict | list):
        what = f"is one JSON document whose '{source.problem}' holds a {type(row[source.problem]).__name__}, not one row per line"
        raise SourceError(what, path, 'Write one object per line, with pandas: to_json(path, orient="records", lines=True)')


def _row(line: bytes, where: str) -> dict[str, Any]:
    """One JSON object. A number becomes the text in the file, without a final `.0`."""
    try:
        row = json.loads(line.decode("utf-8"), parse_int=str, parse_float=lambda text: text.removesuffix(".0"))
    except UnicodeDecodeError as error:
        if line.startswith(_PACKED):
            raise SourceError("is compressed", where, "Unpack it: gunzip, or zstd -d") from error
        what = f"is not UTF-8 text (byte {error.start + 1} of the line)"
        raise SourceError(what, where, "Convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        raise SourceError(f"malformed JSON: {error.msg} at column {error.colno}", where, _EXPECTED) from error
    except RecursionError as error:
        raise SourceError("malformed JSON: nested too deeply", where, _EXPECTED) from error
    if not isinstance(row, dict):
        raise SourceError(f"holds a JSON {type(row).__name__}, not an object", where, _EXPECTED)
    return row
