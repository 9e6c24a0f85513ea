"""The text of a single token id, or its bytes when a token of a byte-level vocabulary is no valid UTF-8."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from pipeline.models.tokenizers.alphabet import bytes_of

_WORD_START = "\u2581"  # SentencePiece's sign for a space; decoding a single token drops this space


class Piece(NamedTuple):
    """Text of one token, and what it is: "text", "special" (not part of the answer) or "bytes" (`text` lists them in hex)."""

    text: str
    kind: str


def pieces(tokenizer: Any, ids: Iterable[int]) -> list[Piece]:
    """A Piece for every id, in order. An id that the tokenizer does not know becomes a number."""
    ids = list(ids)
    special = set(tokenizer.all_special_ids)
    raw = tokenizer.convert_ids_to_tokens(ids)
    known = [i for i, token in zip(ids, raw, strict=True) if token is not None]
    texts = iter(tokenizer.batch_decode([[i] for i in known], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return [_unknown(i) if token is None else _piece(token, next(texts), i in special) for i, token in zip(ids, raw, strict=True)]


def _unknown(token_id: int) -> Piece:
    return Piece(f"id {token_id}", "bytes")


def _piece(token: str, text: str, special: bool) -> Piece:
    if special:
        return Piece(token, "special")
    if "\ufffd" in text or (not text and token):
        found = bytes_of(token)
        if found is not None:
            return Piece(found.hex(" ").upper(), "bytes") if found else Piece("", "text")
    if token.startswith(_WORD_START) and not text.startswith(" "):
        text = f" {text}"
    return Piece(text, "text")
