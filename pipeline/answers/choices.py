"""Choices: `B`, `(B)` and `\\text{(B)} 5` are one option of a question with several, and its letter decides."""

from __future__ import annotations

import re

_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s*:?\s*)?(?:\(([A-J])\)|\[([A-J])\]|([A-J])(?=[.:)]|$))[.:)]?\s*(.*)", re.DOTALL | re.IGNORECASE
)
_OPERATOR = re.compile(r"[=+*/^_,<>]|\\(?:approx|cdot|times|div|pm|cup|cap|to|in)(?![a-zA-Z])")
_LETTER = re.compile(r"\(?([A-J])\)?[.:]?")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


_LETTERS = re.compile(r"\(?[A-J]\)?(?:(?: ?, ?| and |, and | ?& ?| )\(?[A-J]\)?)+")
_NAMED = re.compile(r"^(?i:option|choice)\s*:?\s*(?=\(?[A-J]\)?[.:]?$)")
_OPTION = re.compile(r"(?:\\text\s*\{)?\s*(?:\([A-J]\)|[A-J][.:)](?=\s|\\|\}))\s*\}?\s*(\S.*)", re.DOTALL)


def option_text(text: str) -> str:
    """The text of a reference with letter and text, `\\text{(B)} 5`, without its letter. Another text as it is."""
    option = _OPTION.fullmatch(text)
    return option[1] if option else text


def same_choice(ours: str, theirs: str) -> bool | None:
    """Whether two choices such as `B`, `(B)` and `\\text{(B)} 5` are the same. None when the reference is no choice."""
    ours, theirs = (" ".join(_TEXT.sub(r" \1 ", text).replace("{", " ").replace("}", " ").split()) for text in (ours, theirs))
    theirs = _NAMED.sub("", theirs)
    mine, yours = _letters(ours), _letters(theirs)
    if mine and yours:
        return mine == yours
    reference = _LETTER.fullmatch(theirs)
    if reference is None:
        return _same_option(ours, theirs)
    given = _CHOICE.fullmatch(ours)
    if given is None:
        return False if re.search(r"\(?\b[A-J]\b\)?.*\b[A-J]\b", ours) else None
    letter, rest = given[1] or given[2] or given[3], given[4]
    if not letter.isupper() and given[3]:
        return None
    if re.search(r"(?<![\w\\])\(?[A-J]\)?(?![\w])", rest) or _OPERATOR.match(rest):
        return False
    return letter.upper() == reference[1]


def _same_option(ours: str, theirs: str) -> bool | None:
    """The same for a reference with letter and text, `(B) 5` or `B. 5`: its letter decides."""
    reference = re.fullmatch(r"(?:\(([A-J])\)|([A-J])[.:)](?=\s)) ?(\S.*)", theirs)
    given = reference and (_CHOICE.fullmatch(ours) or _LETTER.fullmatch(ours))
    if not reference or not given or ours[:1] not in "([ABCDEFGHIJ":
        return None
    letters = [group for group in given.groups()[:3] if group]
    return bool(letters) and letters[0].upper() == (reference[1] or reference[2])


def _letters(text: str) -> set[str] | None:
    """The letters of several choices: `A, C`, `(A) and (C)` or `AC`. None for another text."""
    joined = re.fullmatch(r"[A-J]{2,6}", text) and sorted(set(text)) == list(text)
    return set(re.findall(r"[A-J]", text)) if joined or _LETTERS.fullmatch(text) else None
