"""Answers: two of them are the same, different, or for mathematics to compare, as far as their texts tell."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from pipeline.answers.choices import option_text, same_choice
from pipeline.answers.conditions import condition_of, needed, unlike, without_condition
from pipeline.answers.quantities import (
    UNITS,
    Quantity,
    based,
    conflict,
    is_number,
    listed,
    quantity,
    residue,
    same_amounts,
    same_size,
    total,
    without_words,
)
from pipeline.answers.responses import DENIAL
from pipeline.answers.shorthand import same_by_sight, written_out
from pipeline.answers.spelling import plain
from pipeline.answers.spoken import counted, spoken

_INTEGER = re.compile(r"-?\d+", re.ASCII)
_WORDS = re.compile(r"[^\W\d_]{2,}(?: [^\W\d_]+)*")
_NUMBER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d+))?", re.ASCII)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_LOOSE_SPACE = re.compile(r"(?<=\W) | (?=\W)")
_RELATION = re.compile(r"(?:\\neq|\\geq|\\leq|<|>)(?![a-zA-Z])")
_LABEL = re.compile(
    r"(?:\\text\{([^{}]*)\}[^=:<>,()]{0,30}|\\(?:max|min|sup|inf|lim|gcd|lcm|operatorname|deg|det)(?![a-zA-Z])[^=<>,]{0,40}|"
    r"([A-Za-z]{2,}(?: [A-Za-z]{2,})* ?))\s*[=:]\s*(?=[^\s=])(.+)",
    re.DOTALL,
)
_FACTOR = re.compile(r"\b(?:times|twice|double|half|third|plus|minus|two|three|negative)\b", re.I)
_ANSWER = re.compile(r"^(?:\\text\{)?\s*(?:(?:the |final |correct )*answers?(?: (?:is|are):?|:)|therefore,?)\s*\}?\s*", re.I)
_DERIVED = re.compile(r"^\\approx\s*|^\\(?:therefore|implies|Rightarrow)\s*|^=\s*|^[a-zA-Z] ?\\(?:to|rightarrow)(?![a-zA-Z])\s*")
_POINT = re.compile(r"^[A-Z]'?(?=\([^()]+,[^()]+\)$)")
_DERIVATIVE = re.compile(r"^\\frac\{d\^?\d? ?[a-z]\}\{d ?[a-z](?:\^\d)?\} ?= ?")
_FUNCTION = re.compile(r"^[fgh](?:_?\{?\d\}?)?\([a-z]\)(?= ?=)")
_PARAMETER = re.compile(r"([a-zA-Z]) ?(?:\\in ?\\mathbb\{[ZN]\}|\\text\{ ?(?:is )?an integer ?\})")
_DOTS = re.compile(r"\\[lc]?dots[a-z]?(?![a-zA-Z])|\.\.\.")
_DOLLARS = re.compile(r"\\\$\s*[-\d.]|^\s*\$\s*-?[\d.][^$]*$")
_AMOUNT = re.compile(r"[-+]?[\d,.]*\d[\d,.]*(?: ?\\(?:times|cdot) ?10\^\{-?\d+\})?", re.ASCII)
_WITH_LETTER = re.compile(rf"({_AMOUNT.pattern}) ?((?<! )[mgshL]|(?<= )[mgshLJNWVACKTF])", re.ASCII)
_ONLY_WORDS = re.compile(r"[a-zA-Z]{4,}")
_PUNCTUATION = re.compile(r"[.,;:!\"]|(?<![a-zA-Z])'|(?<=[a-zA-Z]{2})'")  # `A'` is not A
_PRIMED = re.compile(r"[a-zA-Z](?:_\{?\w\}?)?'+")
_COEFFICIENT = re.compile(r"\d ?[a-zA-Z](?![a-zA-Z])")
_PLAIN_TEXT = re.compile(r"[^\W\d_]+(?:[ -][^\W\d_]+)*")
_INDEX = re.compile(r"_\{[A-Za-z0-9]+\}")
_LISTED = re.compile(r"(?<![a-zA-Z\\])or(?![a-zA-Z])")
_MACRO = re.compile(r"\\(?:begin|end)\{[a-z]*\}|\\[a-zA-Z]+")
_ARTICLE = re.compile(r"^(?:an?|the) (?=\w{2})")
_LIST_JOINT = re.compile(r",? and |, ?| ?& ?")
_TRUTH = re.compile(r"(yes|no|true|false) ?[,.;:!]", re.I)
_SYNONYMS = [
    {"no solution", "no solutions", "no real solution", "no real solutions", "none", r"\emptyset"},
    {"does not exist", "dne", "doesn't exist", "doesn t exist", "undefined"},
    {"yes", "true"},
    {"no", "false"},
    {"none", "0", "zero"},
    {"none", "none of these", "none of the above"},
    {"infinitely many", "infinitely many solutions", "infinite solutions", "infinite", r"\infty"},
]


def normal_form(answer: str) -> str:
    """An answer in one spelling. LaTeX spacing and dollar signs go, `1,000.50` becomes `1000.5`, and `+07` becomes `7`.

    Answers with equal normal forms are the same.
    """
    return _number_form(_bare(plain(answer)))


def compare_texts(answer: str, reference: str) -> bool | None:
    """Whether two answers are the same. None when their texts cannot decide it; then the mathematical verifier must."""
    decided = decide(answer, reference)
    return decided if isinstance(decided, bool) else None


@lru_cache(maxsize=4096)
def decide(answer: str, reference: str) -> bool | tuple[str, str]:
    """Whether two answers are the same, or the pair of plain LaTeX texts that the mathematical verifier must compare.

    Different integers are different answers. So are different words, and their case does not count. The mathematical verifier
    reads a word as a product of letters, so 'listen' would equal 'silent'. A reference of two or three letters may really be a
    product, so it is left to the verifier.
    """
    ours, theirs = plain(answer), plain(reference)
    if not ours:
        return False
    if (seen := same_by_sight(ours, theirs)) is not None:
        return seen
    if normal_form(ours) == normal_form(theirs) or _same_meaning(_words(_bare(ours)), _words(_bare(theirs))):
        return True
    if _denied(ours, theirs) or (_DOTS.search(ours) and not _DOTS.search(theirs)):
        return False
    chosen = same_choice(ours, theirs)
    if chosen is not None:
        return chosen
    ours, theirs = written_out(ours, theirs)
    ours, theirs = _parameters(*_functions(_unlabelled(option_text(ours)), _unlabelled(option_text(theirs))))
    dollars = [bool(_DOLLARS.search(text)) for text in (answer, reference)]
    return _same_value(spoken(ours) or ours, spoken(theirs) or theirs, dollars)


def _denied(ours: str, theirs: str) -> bool:
    """Whether our text denies something, or only bounds it, and the reference does not."""
    denies = [DENIAL.search(_TEXT.sub(r" \1 ", text)) is not None for text in (ours.rstrip("? "), theirs)]
    return (denies[0] and not denies[1]) or bool(_RELATION.match(ours) and not _RELATION.match(theirs))


def _same_value(ours: str, theirs: str, dollars: list[bool]) -> bool | tuple[str, str]:
    """`decide` for two plain texts that are no choices. dollars: which of them stood behind a dollar sign."""
    for based_on in (based, residue):
        mine, yours = based_on(ours), based_on(theirs)
        if mine and yours:
            return mine == yours
        ours, theirs = mine[0] if mine else ours, yours[0] if yours else theirs
    if len(listed(ours)) > 1 or len(listed(theirs)) > 1:
        return _same_list(ours, theirs, dollars)
    conditions = [condition_of(text) for text in (ours, theirs)]
    if all(conditions) and unlike(*conditions):
        return False
    if all(conditions) or not needed(conditions[1], theirs):
        ours, theirs = (without_condition(text) for text in (ours, theirs))
    one, other = (_paid(quantity(text), paid) for text, paid in zip((ours, theirs), dollars, strict=True))
    if other.words and not one.words and (letter := _WITH_LETTER.fullmatch(one.value)):
        one = Quantity(letter[1], letter[2], UNITS.get(letter[2]))
    if conflict(one, other):
        return same_size(one, other)
    mine_text, your_text = _in_radians(one, other), _in_radians(other, one)
    mine_text = spoken(mine_text) or _letter_unit(mine_text, your_text)
    if is_number(your_text):
        mine_text = counted(mine_text) or mine_text
    return _same_text(mine_text, spoken(your_text) or your_text, ours)


def _same_list(ours: str, theirs: str, dollars: list[bool]) -> bool | tuple[str, str]:
    """`decide` where a text is several quantities: parts of one, such as `4 hours 30 minutes`, or a list."""
    mine, yours = (
        [(number, "dollar") for number in re.findall(r"\d[\d.]*", text)] if paid and not listed(text) else listed(text)
        for text, paid in zip((ours, theirs), dollars, strict=True)
    )
    sums = [total(parts) for parts in (mine, yours)]
    if any(sums):
        return sums[0] == sums[1]
    letters = any(len(word) == 1 and word not in UNITS for _, word in mine + yours)
    if letters or not ((mine and yours) or without_words(mine + yours)):
        return _same_text(ours, theirs, ours)
    if mine and yours:
        return same_amounts(mine, yours)
    bare, other = (", ".join(number for number, _ in parts) or text for parts, text in ((mine, ours), (yours, theirs)))
    return _same_text(bare, other, bare)


def _same_text(mine_text: str, your_text: str, ours: str) -> bool | tuple[str, str]:
    """`decide` for two values without their units. ours: our whole answer."""
    forms = [_number_form(_bare(text)) for text in (mine_text, your_text)]
    if forms[0] == forms[1]:
        return True
    if any(map(_PRIMED.fullmatch, forms)):
        return False  # a parser reads no prime
    if all(map(_INTEGER.fullmatch, forms)) or (is_number(forms[1]) and _LISTED.search(ours)):
        return False
    words = _same_words(forms[0], forms[1], your_text)
    if words is None and _TEXT.fullmatch(mine_text) and "\\text" not in your_text:
        return False  # a word is no formula
    return words if words is not None else (mine_text, your_text)


def _same_words(ours: str, theirs: str, reference: str) -> bool | None:
    """Whether two texts of words are the same. None when the reference may be mathematics."""
    mine, yours = _words(ours), _words(theirs)
    if _same_meaning(mine, yours):
        return True
    if yours in {"yes", "no", "true", "false"}:
        said = _TRUTH.match(ours)
        only = said is not None and not {"yes", "no", "true", "false", "but", "or"} & set(mine.split()[1:])
        return only and said is not None and _same_meaning(said[1].casefold(), yours)
    listed = [text.casefold().rstrip(".").removeprefix("\\{").removesuffix("\\}") for text in (ours, theirs)]
    lists = [sorted(_ARTICLE.sub("", part) for part in _LIST_JOINT.split(text)) for text in listed]
    if lists[0] == lists[1] and _PLAIN_TEXT.search(theirs) and not _COEFFICIENT.search(theirs):
        return True
    if "\\begin{cases}" in reference:
        return None  # its words may be conditions
    spelled = _TEXT.fullmatch(reference) is not None
    if _WORDS.fullmatch(theirs):
        return None if len(theirs) <= 3 and not spelled else False
    prose = " ".join(word for word in _TEXT.findall(reference) if word.strip() not in UNITS)
    return False if spelled or _ONLY_WORDS.search(prose + _MACRO.sub(" ", _TEXT.sub(" ", _INDEX.sub(" ", reference)))) else None


def _same_meaning(mine: str, yours: str) -> bool:
    """Whether two texts are the same words, or words that say the same."""
    return any({mine, yours} <= same for same in _SYNONYMS) or (mine == yours and _PLAIN_TEXT.fullmatch(yours) is not None)


def _words(text: str) -> str:
    """A text in small letters, without punctuation and an article in front."""
    return _ARTICLE.sub("", " ".join(_PUNCTUATION.sub(" ", text).split()).casefold())


def _bare(text: str) -> str:
    """A plain text without text macros and loose spaces."""
    return _LOOSE_SPACE.sub("", " ".join(_TEXT.sub(r"\1", text).split())).strip()


def _unlabelled(text: str) -> str:
    """A plain answer without the words in front of it: `\\text{Area} = 5`, `Profit: 5`, `the answer is 5`."""
    text = _POINT.sub("", _DERIVATIVE.sub("", _DERIVED.sub("", _ANSWER.sub("", text))))
    label = _LABEL.fullmatch(text)
    if label is None or (label[2] and len(label[2].strip()) < 3) or _FACTOR.search(label[1] or ""):
        return text
    return label[3].strip()


def _functions(ours: str, theirs: str) -> tuple[str, str]:
    """Both with `y =` for `f(x) =` where only one of them has a function."""
    names = [_FUNCTION.match(text) is not None for text in (ours, theirs)]
    return (ours, theirs) if names[0] == names[1] else (_FUNCTION.sub("y", ours), _FUNCTION.sub("y", theirs))


def _parameters(ours: str, theirs: str) -> tuple[str, str]:
    """Both with k for the letter of which they say that it is an integer: `x = n\\pi, n \\in \\mathbb{Z}`."""

    def named(text: str) -> str:
        """One of them with k."""
        found = _PARAMETER.findall(text)
        if len(set(found)) != 1 or re.search(r"(?<![a-zA-Z\\])k(?![a-zA-Z])", text):
            return text
        return re.sub(rf"(?<![a-zA-Z\\]){found[0]}(?![a-zA-Z])", "k", text)

    return named(ours), named(theirs)


def _paid(amount: Quantity, dollars: bool) -> Quantity:
    """A quantity in dollars where a dollar sign stood in front of it, and it has no other unit."""
    return replace(amount, kind=UNITS["dollar"]) if dollars and not amount.words else amount


def _in_radians(one: Quantity, other: Quantity) -> str:
    """The value of `one`. Degrees become radians where the other one is a multiple of pi."""
    if one.kind != UNITS["degree"] or other.kind == one.kind or "\\pi" in one.value or "\\pi" not in other.value:
        return one.value
    return f"\\frac{{({one.value}) \\pi}}{{180}}"


def _letter_unit(ours: str, theirs: str) -> str:
    """Our answer without a unit of one letter, `5 m` or `5 N`, where the reference is a number."""
    if not _AMOUNT.fullmatch(theirs):
        return ours
    found = _WITH_LETTER.fullmatch(ours)
    return found[1] if found else ours


def _number_form(text: str) -> str:
    number = _NUMBER.fullmatch(text)
    if number is None or not (number[2] or number[3]):
        return text
    whole, part = number[2].replace(",", "").lstrip("0") or "0", (number[3] or "").rstrip("0")
    value = f"{whole}.{part}" if part else whole
    return f"-{value}" if number[1] == "-" and value != "0" else value
