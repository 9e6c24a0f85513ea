"""How much of a text the page shows, so that all texts together fit."""

from __future__ import annotations

import json

MOST_TEXT = 20_000  # characters of a problem, a solution or a plain response; fewer when all texts exceed their limit
LINE = 160  # characters of a problem in lists


def room(texts: list[str], limit: int) -> int:
    """Characters that each text may keep so that all texts have at most `limit` bytes as JSON, or 100 characters each."""
    most = MOST_TEXT
    while most > 100 and sum(_bytes(text[:most]) for text in texts) > limit:
        most //= 2
    return most


def _bytes(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace"))
