"""The tokens of a `tokenizer.json`, for a machine on which transformers is not installed. It reads single tokens, and no text.

It has the three methods of a tokenizer that `pipeline.report.sampled.tokens` asks for.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Model
from pipeline.models.resolve import resolve_model
from pipeline.models.tokenizers.alphabet import bytes_of
from pipeline.models.tokenizers.tokenizer import tokenizer_of


class Vocabulary:
    """The tokens of a folder's tokenizer by id. A folder without `tokenizer.json` has none, so each id is shown as a number."""

    def __init__(self, folder: str) -> None:
        path = Path(folder) / "tokenizer.json"
        document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        vocab = document.get("model", {}).get("vocab", {})
        pairs = vocab.items() if isinstance(vocab, dict) else ((token, place) for place, (token, _) in enumerate(vocab))
        added = document.get("added_tokens", [])
        self._tokens: dict[int, str] = {number: token for token, number in pairs} | {one["id"]: one["content"] for one in added}
        self.all_special_ids = [one["id"] for one in added if one["special"]]
        self._added = {one["id"] for one in added}
        self._by_bytes = _has(document.get("decoder"), "ByteLevel")

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """The entry of each id, or None."""
        return [self._tokens.get(number) for number in ids]

    def batch_decode(self, rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        """The text of each row of ids, of which each has one."""
        return [self._text(row[0]) for row in rows]

    def _text(self, number: int) -> str:
        token = self._tokens[number]
        if self._by_bytes and number not in self._added:
            found = bytes_of(token)
            return token if found is None else found.decode(errors="replace")
        return token.replace("\u2581", " ")


def _has(decoder: Any, kind: str) -> bool:
    """Whether a decoder of `tokenizer.json`, or a part of it, is of a kind."""
    if not isinstance(decoder, dict):
        return False
    return decoder.get("type") == kind or any(_has(part, kind) for part in decoder.get("decoders", []))


def token_reader(model: Model) -> Any:
    """What reads single tokens of a model: its tokenizer, or its vocabulary where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return Vocabulary(resolve_model(model.path))
    return tokenizer_of(model)
