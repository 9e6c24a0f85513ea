"""Conditions that an answer ends with: `where k is odd`, `for all x > 0`. Some narrow the answer, and others say its domain.

What narrows must be the same in both answers. A domain may be left out, and may be spelled in many ways.
"""

from __future__ import annotations

import re

_CONDITION = re.compile(
    r"[\s,;(]*(?:\\text\{\s*)?(?:,?\s*where|for (?:all|any|some|every|integers?)|with(?! (?:a )?remainder))\b.*$|"
    r"(?:^|[,;(]) ?\(?(?:\\forall )?[a-zA-Z](?:, ?[a-zA-Z])* ?"
    r"(?:\\in ?\\mathbb\{[A-Z]\}(?:[\^_]\{?[+*]\}?)?|\\text\{ ?(?:is )?an integer ?\}) ?\)?$",
    re.DOTALL,
)
_NARROWING = re.compile(
    r"(?<![a-z])(?:odd|even|prime|composite|distinct|square)(?![a-z])|"
    r"remainder\s*-?\w+|[a-z]?\s*(?:=|\\equiv)\s*[^\s,;})]+|mod\W*\d+"
)
_BOUND = re.compile(r"[a-z\d]\s*(?:<|>|\\[lgn]eq)\s*-?[a-z\d./]+")
_SIGNED = re.compile(r"(?<![a-z])(?:non-?negative|non-?positive|positive|negative)(?![a-z])")
_NATURAL = re.compile(r"(?<![a-z])natural|\\mathbb\{n\}|\\mathbb\{z\} ?[\^_]")
_INTEGERS = re.compile(r"(?<![a-z])integer|\\mathbb\{z\}")
_REALS = re.compile(r"(?<![a-z])reals?(?![a-z])|\\mathbb\{r\}")
_VALUE = re.compile(r"([a-zA-Z])\s*=")
_MACRO = re.compile(r"\\[a-zA-Z]+")


def condition_of(text: str) -> str:
    """The condition that a plain text ends with. "" for none."""
    found = _CONDITION.search(text)
    return found[0] if found and found.start() else ""


def without_condition(text: str) -> str:
    """A plain text without the condition that it ends with."""
    return _CONDITION.sub("", text) or text


def unlike(one: str, other: str) -> bool:
    """Whether two conditions narrow answers in different ways, or say different domains. What only one of them says is none."""
    if _narrowed(one) != _narrowed(other):
        return True
    return any(mine and yours and mine != yours for mine, yours in zip(_domain(one), _domain(other), strict=True))


def needed(condition: str, text: str) -> bool:
    """Whether the condition of a reference is part of its value: a remainder, or the value of a letter that it has.

    In `x = 2 with y = 3` it is a part, too.
    """
    rest = _MACRO.sub(" ", without_condition(text))
    letters = _VALUE.findall(condition)
    return "remainder" in condition or "\\equiv" in condition or any(letter in rest or "=" in rest for letter in letters)


def _narrowed(condition: str) -> set[str]:
    return {"".join(part.split()) for part in _NARROWING.findall(condition.lower())}


def _domain(condition: str) -> tuple[set[str], set[str], str]:
    """The bounds, signs and kind of numbers of a condition, each empty where it says none."""
    said = condition.lower()
    bounds = {"".join(part.split()) for part in _BOUND.findall(said)}
    signs = {sign.replace("-", "") for sign in _SIGNED.findall(said)}
    if _NATURAL.search(said) or (_INTEGERS.search(said) and (bounds or signs)):
        return bounds, signs, "some integers"
    return bounds, signs, "integers" if _INTEGERS.search(said) else "reals" if _REALS.search(said) else ""
