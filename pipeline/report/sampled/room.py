"""The text of a problem, and how much of a text the page shows, so that all texts together fit."""

from __future__ import annotations

import json
from typing import Any

MOST_TEXT = 20_000  # characters of a problem, a solution or a plain response; fewer when all texts exceed their limit
LINE = 160  # characters of a problem in lists


def room(texts: list[str], limit: int) -> int:
    """Characters that each text may keep so that all texts have at most `limit` bytes as JSON, or 100 characters each."""
    most = MOST_TEXT
    while most > 100 and sum(_bytes(text[:most]) for text in texts) > limit:
        most //= 2
    return most


def asked(prompt: dict[str, Any]) -> str:
    """The text of a problem, or all turns of its conversation with their roles."""
    if not prompt.get("messages"):
        return prompt["problem"] or ""
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in json.loads(prompt["messages"]))


def _bytes(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace"))
