"""The bytes of a vocabulary's entries, in SentencePiece's alphabet and in the byte-level one of GPT-2."""

from __future__ import annotations

import re
from functools import lru_cache

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def bytes_of(token: str) -> bytes | None:
    """The bytes of a vocabulary entry in SentencePiece's or the byte-level alphabet. None when it is in neither alphabet."""
    if found := _BYTE.fullmatch(token):
        return bytes.fromhex(found[1])
    try:
        return bytes(_alphabet()[character] for character in token)
    except KeyError:
        return None


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """The byte-level alphabet since GPT-2: printable bytes stand for themselves, the others for code points from 256."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + place): byte for place, byte in enumerate(moved)}
