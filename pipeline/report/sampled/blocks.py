"""Blocks: the tokens and texts of neighbouring traces, compressed, which the page opens when somebody looks at one of them.

A block is gzip of: u4 length of the head, the head as UTF-8 JSON, and the sections that the head names, one behind the other. A
section holds numbers byte plane by byte plane: first the lowest byte of each, then the next. Such planes compress better.
All numbers are little-endian; f2 is a half float.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BLOCK_TOKENS = 16_384  # a block ends with the group that reaches this


@dataclass
class Words:
    """Words of the page: the numbers of token ids in the order in which they first come."""

    numbers: dict[int, int] = field(default_factory=dict)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The words of token ids, int64 [N]. Unseen ids get the next numbers."""
        known, places = np.unique(ids, return_inverse=True)
        return np.array([self.numbers.setdefault(i, len(self.numbers)) for i in known.tolist()], np.int64)[places.ravel()]


def pack(head: dict[str, Any], sections: Iterable[tuple[str, str, np.ndarray]]) -> str:
    """A block in base64. sections: name, kind ("u1", "u4" or "f2") and values [N] of each. The same content gives the same text.

    Values beyond the range of a half float become its largest. Raises ValueError on NaN in the head.
    """
    named, parts = [], []
    for name, kind, values in sections:
        named.append([name, kind, len(values)])
        numbers = np.clip(values, -65504, 65504) if kind == "f2" else values
        flat = np.frombuffer(np.ascontiguousarray(numbers, dtype=f"<{kind}").tobytes(), np.uint8)
        parts.append(flat.reshape(len(values), np.dtype(kind).itemsize).T.tobytes())
    text = json.dumps(head | {"sections": named}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    begin = text.encode("utf-8", "replace")
    whole = len(begin).to_bytes(4, "little") + begin + b"".join(parts)
    return base64.b64encode(gzip.compress(whole, 6, mtime=0)).decode()
