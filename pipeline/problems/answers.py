"""Answers: the one that a solution states, the one that a response ends with, and whether two answers have the same text."""

from __future__ import annotations

import re

_BOXED = re.compile(r"(\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
_FINAL = re.compile(r"####[ \t]*([^\n]+)")
_LAST_NUMBER = re.compile(r"(?<![\d.])[-+]?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?(?:/\d+)?", re.ASCII)
_NUMBER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d+))?", re.ASCII)
_INTEGER = re.compile(r"-?\d+", re.ASCII)
_WORDS = re.compile(r"[^\W\d_]{2,}(?: [^\W\d_]+)*")
_FILLERS = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;: ]|\$|\\[()\[\]]")
_TEXT_MACRO = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_LOOSE_SPACE = re.compile(r"(?<=\W) | (?=\W)")


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} whose braces balance, or None. Takes one pass over the text at any depth of nesting."""
    if "\\boxed" not in text:
        return None
    last = (-1, -1)
    opened: list[int] = []  # where each open brace's content starts; -1: not a \boxed
    for token in _BOXED.finditer(text):
        if token[1]:
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(-1)
        elif token[0] == "}" and opened:
            last = max(last, (opened.pop(), token.start()))
    return text[last[0] : last[1]] if last[0] >= 0 else None


def stated_answer(text: str) -> str | None:
    """The answer that a worked solution states: its last \\boxed{...} (MATH, Minerva), else what follows `####` (GSM8K)."""
    boxed = last_boxed(text)
    _, mark, stated = text.rpartition("####")
    return (boxed if boxed is not None else stated if mark else "").strip() or None


def final_answer(text: str) -> str | None:
    """The answer a response ends with: the last \\boxed{...}, else the last `#### x`, else the last number, else None."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    for pattern, group in ((_FINAL, 1), (_LAST_NUMBER, 0)):
        last = None
        for last in pattern.finditer(text):  # noqa: B007 - the last match is what is wanted
            pass
        if last is not None and last[group].strip():
            return last[group].strip()
    return None


def normal_form(answer: str) -> str:
    """An answer in one spelling. LaTeX spacing and dollar signs go, `1,000.50` becomes `1000.5`, and `+07` becomes `7`.

    Answers with equal normal forms are the same.
    """
    text = _FRACTION.sub(r"\\frac", _TEXT_MACRO.sub(r"\1", _FILLERS.sub("", answer.replace("−", "-"))))
    text = _LOOSE_SPACE.sub("", " ".join(text.split()).removesuffix(".").strip())
    number = _NUMBER.fullmatch(text)
    if number is None or not (number[2] or number[3]):
        return text
    whole, part = number[2].replace(",", "").lstrip("0") or "0", (number[3] or "").rstrip("0")
    value = f"{whole}.{part}" if part else whole
    return f"-{value}" if number[1] == "-" and value != "0" else value


def compare_texts(answer: str, reference: str) -> bool | None:
    """Whether two answers are the same. None when their texts cannot decide it; then the mathematical verifier must.

    Different integers are different answers. So are different words, and their case does not count. The mathematical verifier
    reads a word as a product of letters, so 'listen' would equal 'silent'. A reference of two or three letters may really be a
    product, so it is left to the verifier.
    """
    ours, theirs = normal_form(answer), normal_form(reference)
    if ours == theirs:
        return True
    if _INTEGER.fullmatch(ours) and _INTEGER.fullmatch(theirs):
        return False
    if _WORDS.fullmatch(theirs):
        same = ours.casefold() == theirs.casefold()
        return same or (False if len(theirs) > 3 else None)
    return None
