"""Numbers in words: `twenty-one`, `one hundred and five`, `three quarters`, `negative 3`."""

from __future__ import annotations

import re
from fractions import Fraction

_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_SMALL += " seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_VALUES = {word: value for value, word in enumerate(_SMALL.split())}
_VALUES |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
_PARTS |= {"halves": 2} | {f"{word}s": value for word, value in _PARTS.items()}
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_DIGITS = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|\\frac\{\d+\}\{\d+\}", re.ASCII)
_JOINS = "of or and to than not no less more minus plus times hundred"
_NO_THINGS = frozenset(_JOINS.split()) | {*_VALUES, *_LARGE, *_PARTS}


def spoken(text: str) -> str | None:
    """A number that is written in words, as digits or as a LaTeX fraction. None for another text."""
    words = _words(text)
    sign = "-" if words[:1] in (["negative"], ["minus"]) and len(words) > 1 else ""
    words = words[1:] if sign else words
    if sign and len(words) == 1 and _DIGITS.fullmatch(words[0]):
        return f"-{words[0]}"
    value = _value(words)
    if value is None:
        return None
    return f"{sign}{value}" if value.denominator == 1 else f"{sign}\\frac{{{value.numerator}}}{{{value.denominator}}}"


def counted(text: str) -> str | None:
    """The number of `five apples`: words for a whole number, then up to three words for what is counted. None otherwise."""
    words = _words(text)
    for end in range(len(words) - 1, 0, -1):
        value, things = _value(words[:end]), words[end:]
        if value is not None and value.denominator == 1:
            plain = len(things) <= 3 and all(word.isalpha() for word in things) and not _NO_THINGS & set(things)
            return str(value) if plain else None
    return None


def _words(text: str) -> list[str]:
    return _TEXT.sub(r" \1 ", text).strip().lower().replace("-", " ").split()


def _value(words: list[str]) -> Fraction | None:
    """The value of number words. None when one of them is none."""
    if words and words[-1] in _PARTS:
        alone = words in (["half"], ["quarter"])  # `fourth` alone is an ordinal
        count = 1 if alone or words[:-1] == ["a"] else _whole(words[:-1])
        return None if count is None else Fraction(count, _PARTS[words[-1]])
    whole = _whole(words)
    return None if whole is None else Fraction(whole)


def _whole(words: list[str]) -> int | None:
    """The whole number that words make, as English puts them together. None for others, such as `two three`."""
    total = part = 0
    room = 10**12  # what a next word must stay below: `twenty` leaves room for `one`, and `one` for nothing
    for place, word in enumerate(words):
        if word == "and" and 0 < place < len(words) - 1:
            continue
        if word == "hundred" and 0 < part < 10:
            part, room = part * 100, 100
        elif word in _LARGE and 0 < part < 1000 and (total == 0 or total > _LARGE[word] * 1000 - 1):
            total, part, room = total + part * _LARGE[word], 0, 1000
        elif word in _VALUES and _VALUES[word] < room and (_VALUES[word] or len(words) == 1):
            value = _VALUES[word]
            part, room = part + value, 10 if value >= 20 else 0
        else:
            return None
    return total + part if words else None
