"""Shorthand: `1.2M`, `C(5,2)` and the decimal comma of `3,5`, written out where the other answer leaves them one meaning.

Alone they may mean something else: `5M` may be a product, `C(5,2)` a point, and `3,5` a list of two numbers.
"""

from __future__ import annotations

import re

from pipeline.answers.quantities import MAGNITUDES, is_number

_LETTERS = {"K": "thousand", "k": "thousand", "M": "million", "B": "billion", "bn": "billion"}
_MAGNITUDE = re.compile(r"([-+]?[\d,]{0,20}\.?\d{1,20})(K|k|M|B|bn)", re.ASCII)
_CHOICES = re.compile(r"(?<![\w\\])(?:C ?\((\d{1,4}), ?(\d{1,4})\)|(\d{1,4})C(\d{1,4})(?![\w{]))", re.ASCII)
_BARE = re.compile(r"\d{1,4}C\d{1,4}", re.ASCII)  # two of them may be numbers with the base 16
_PAIR = re.compile(r"\([^()]*,[^()]*\)")
_COMMA = re.compile(r"([-+]?)(\d{1,3}(?:\.\d{3})+|\d+),(\d+)", re.ASCII)
_DECIMAL = re.compile(r"[-+]?\d*\.\d+", re.ASCII)
_CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)(:00)? ?(?:(?:\\text\{ ?)?([ap])\.? ?m\.?\}?)?", re.ASCII | re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)  # a formula would be a difference
_LISTED = re.compile(r"\d, \d{3}(?!\d)", re.ASCII)


def written_out(ours: str, theirs: str) -> tuple[str, str]:
    """An answer and its reference, both plain, without shorthand."""
    return _decimal(_written(ours, theirs), theirs), _decimal(_written(theirs, ours), ours, reference=True)


def same_by_sight(ours: str, theirs: str) -> bool | None:
    """Whether a list, a date or a time of day decides it. None for other texts.

    `32, 349` is not `32349`, `2024-01-02` is no number, and `20:34` is `8:34 pm`.
    """
    if (_LISTED.search(ours) and is_number(theirs)) or (_LISTED.search(theirs) and is_number(ours)):
        return False
    if _DATE.fullmatch(ours) or _DATE.fullmatch(theirs):
        return ours == theirs
    mine, yours = _CLOCK.fullmatch(ours), _CLOCK.fullmatch(theirs)
    if mine is None or yours is None:
        return None
    if any(time[3] or time[4] for time in (mine, yours)) and _minutes(mine) == _minutes(yours):
        return True
    plain = not mine[4] and not yours[4] and any(time[2][0] == "0" for time in (mine, yours))  # a proportion has no `:05`
    return _minutes(mine) == _minutes(yours) if plain else None


def _minutes(time: re.Match[str]) -> int:
    """The minutes since midnight of a time of day."""
    hours = int(time[1]) % 12 if time[4] else int(time[1])
    return 60 * (hours + 12 * ((time[4] or "").lower() == "p")) + int(time[2])


def _written(text: str, other: str) -> str:
    short = _MAGNITUDE.fullmatch(text)
    if short and (is_number(other) or _MAGNITUDE.fullmatch(other) or any(word in other for word in MAGNITUDES)):
        return f"{short[1]} \\text{{{_LETTERS[short[2]]}}}"
    if _PAIR.fullmatch(other) or (_BARE.fullmatch(text) and _BARE.fullmatch(other)):
        return text
    return _CHOICES.sub(_binomial, text)


def _binomial(found: re.Match[str]) -> str:
    """`C(5,2)` as a binomial. With more below than above it is no count, and stays as it is."""
    above, below = found[1] or found[3], found[2] or found[4]
    return f"\\binom{{{above}}}{{{below}}}" if int(below) <= int(above) else found[0]


def _decimal(text: str, other: str, reference: bool = False) -> str:
    """`3,5` as `3.5` where the other answer is a decimal. A reference may well be a list, so it needs a sign that it is none.

    `1,234` stays 1234. `0,25` and `1.234,5` are neither lists nor whole numbers.
    """
    found = _COMMA.fullmatch(text)
    if found is None or not _DECIMAL.fullmatch(other):
        return text
    sign, whole, part = found.groups()
    certain = "." in whole or (whole == "0" and len(part) > 1)
    grouped = len(part) == 3 and len(whole) <= 3 and whole[0] != "0"
    return f"{sign}{whole.replace('.', '')}.{part}" if certain or not (reference or grouped) else text
