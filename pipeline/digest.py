"""The one short hash of texts, of plain data and of bytes."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """The first 16 hex digits of the sha256 of a text, or of plain data as JSON with sorted keys."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return short(text.encode("utf-8", "surrogatepass"))


def short(data: bytes, digits: int = 16) -> str:
    """The first `digits` hex digits of the sha256 of some bytes."""
    return hashlib.sha256(data).hexdigest()[:digits]
