"""Numbers with words: units, magnitudes such as `million`, several quantities in one answer, and numbers in another base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

_TABLE: dict[str, list[tuple[str, str]]] = {
    "length": [
        ("1/1000", "mm millimeter millimetre"),
        ("1/100", "cm centimeter centimetre"),
        ("1", "m meter metre"),
        ("1000", "km kilometer kilometre"),
        ("127/5000", "inch inches in"),
        ("381/1250", "ft foot feet"),
        ("1143/1250", "yd yard"),
        ("201168/125", "mi mile"),
    ],
    "time": [
        ("1", "s sec second"),
        ("60", "min minute"),
        ("3600", "h hr hour"),
        ("86400", "day"),
        ("604800", "week"),
        ("2629746", "month"),
        ("31556952", "yr year"),
    ],
    "mass": [("1/1000", "mg milligram"), ("1", "g gram"), ("1000", "kg kilogram"), ("45359237/100000", "lb pound")],
    "volume": [("1/1000", "ml milliliter millilitre"), ("1", "l L liter litre"), ("3785411784/1000000000", "gal gallon")],
    "money": [("1/100", "cent"), ("1", "dollar buck usd USD")],
    "angle": [("1", "degree deg")],
    "morning": [("1", "am")],
    "afternoon": [("1", "pm")],
    "speed": [("1", "mph"), ("1", "kmh kph")],
}
UNITS: dict[str, tuple[str, Fraction]] = {
    form: (dimension, Fraction(factor))
    for dimension, rows in _TABLE.items()
    for factor, names in rows
    for name in names.split()
    for form in (name, f"{name}s")
}
MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_FACTORS = {
    "dozen": 12,
    "half": 0,
    "halve": 0,
    "third": 0,
    "quarter": 0,
    **dict.fromkeys(["fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"], 0),
    **dict.fromkeys(["hundredth", "thousandth", "millionth"], 0),
    "pair": 0,
    "score": 0,
}  # 0: a change of value that is not read
_LINKING = frozenset(
    [
        "or",
        "and",
        "not",
        "no",
        "if",
        "when",
        "where",
        "for",
        "than",
        "to",
        "at",
        "least",
        "most",
        "about",
        "except",
        "wrong",
        "incorrect",
        "false",
        "never",
        "but",
        "mod",
    ]
)
_HEDGES = frozenset(("maybe", "perhaps", "possibly", "probably", "likely", "guess", "unsure", "roughly", "almost", "nearly"))
_OPERATIONS = frozenset(("squared", "cubed", "factorial"))  # behind a unit they belong to it
_PERCENT = re.compile(r"\s*(?:\\text\s*\{)?\s*(?<![a-zA-Z])(?:percent|per cent|percentage|percents|pct)\b\s*(?:\}|$)")
_TAIL = re.compile(
    r"\s*(?:\\text\s*\{(?P<macro>[^{}]*)\}|(?<=[\s\d})/\-])(?<![_^\\])(?P<word>[a-zA-Z]{2,})\.?)(?P<power>\s*\^\s*(?:\{-?\d\}|-?\d))?$"
)
_BRACKETED = re.compile(r"(?<=\d)\s*\(\s*(?:in )?(?:\\text\{)?([a-zA-Z]{2,}|m)\}?\s*\)$")
_CLOCK = re.compile(r"(?<=\d)\s*(?:\\text\s*\{)?\s*([ap])\.?\s?m\.?\s*\}?$", re.IGNORECASE)
_UNIT_FRACTION = re.compile(
    r"(?<=[\d}\s])\s*\\frac\{\s*(?:\\text\{)?\s*([a-zA-Z]+)\s*\}?\s*\}\{\s*(?:\\text\{)?\s*([a-zA-Z]+)\s*\}?(?:\s*\^\s*\{?(\d)\}?)?\s*\}$"
)
_SYMBOL = re.compile(r"(?<=[\d}])\s*(?:\\(mu) ?(?:\\text\{)?([mgsLCFA])\}?|\\(?:text\{ ?k ?\})?(Omega)(?![a-zA-Z]))$")
_RATE = re.compile(
    r"(?<=[\d}]) (km|cm|mm|m|mi|ft|g|kg|mol|N|J) ?(?:/|\\cdot|(?= )) ?(s|h|hr|min|kg|m|L|mol|K)(?: ?\^ ?(?:\{-?(\d)\}|-?(\d)))?$"
)
_OPEN_END = re.compile(
    r"(?:[,;=:+<>]|\\(?:approx|cdot|times|leq|geq|neq|in|pm|cup))\s*$|\\(?:sin|cos|tan|cot|sec|csc)\s*[({]?\s*[\d.]+\s*$"
)
_LINK = re.compile(r"\s*(?:/|\\cdot|-|\()\s*$")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?", re.ASCII)
_NAMED = re.compile(r"^[a-zA-Z] ?= ?")
_MACROS = re.compile(r"\\[a-zA-Z]+")
_PART = re.compile(
    r"\s*(?:,|and|\\text\{\s*and\s*\})?\s*(\d[\d,]*(?:\.\d+)?(?:/\d+)?)\s*(?:\\text\{\s*([a-zA-Z]+)\s*\}|([a-zA-Z]+))\.?",
    re.ASCII,
)
_LISTED_WORD = re.compile(r"\\text\{\s*([a-zA-Z]+),? and\s*\}")
_RESIDUE = re.compile(
    r"(?:[a-zA-Z]\s*\\equiv\s*)?(-?\d{1,30})\s*\(?\s*(?:\\[pb]?mod|\\text\{\s*\(?mod\s*\}|mod)\s*\{?\s*(\d{1,30})\s*\}?\s*(?:\)|\\text\{\)\})?"
)
_BASED = re.compile(
    r"\(?([0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?)\)?\s*(?:_\s*\{?\s*(?:\\text\{)?\s*\(?([a-z]+|\d+)\)?\s*\}*|"
    r"\s*(?:\\text\{)?\s*(?:in )?base\s*\}?[ -]?(\d+|[a-z]+)\s*\}?)"
)
_BASES = dict(
    zip(
        ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
        map(str, range(2, 13)),
        strict=True,
    )
)
_BASES["sixteen"] = "16"


_SIGN = re.compile(r"[a-zA-Z]{1,3}\d?(?:/[a-zA-Z]{1,3}\d?)*")
_SPELLED = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "mps": "m/s", "fps": "ft/s", "d": "day"}
_PARTS = dict.fromkeys(("mL", "ml", "cc", "ccm"), "cm3")  # other signs of a part
_SIGNS = ("Hz", "W", "J", "N", "V", "A", "Pa", "eV", "mol", "K", "C", "F", "T", "Wb", "H", "cal", "Wh", "B", "bit", "Bq", "lm")
_OTHERS = (
    *("dm", "dl", "dL", "cl", "cL", "hl", "hL", "nm", "um", "mum", "ug", "mug", "ns", "ms", "us", "mus", "Mg", "Omega", "kOmega"),
    *("oz", "qt", "pt", "rpm", "psi", "atm", "bar", "ton", "ha", "rad", "amu", "lbf"),
)
_KNOWN = frozenset((*_OTHERS, *(f"{prefix}{sign}" for sign in _SIGNS for prefix in ("", *"numcdhkMG"))))


@dataclass(frozen=True)
class Quantity:
    """A value as LaTeX, and what stood behind it. kind: the dimension and factor of a known unit, else None."""

    value: str
    words: str = ""
    kind: tuple[str, Fraction] | None = None


def _rate(found: re.Match[str]) -> str:
    """A rate in letters as one in text, with the power of what is below the line: `m s^{-2}` and `m/s^2` are the same."""
    power = found[3] or found[4]
    return f" \\text{{{found[1]}/{found[2]}}}" + (f"^{power}" if power and power != "1" else "")


def quantity(text: str) -> Quantity:
    """A plain answer as value and unit. Words that join or deny, and letters that may be variables, stay in the value."""
    text = _BRACKETED.sub(r" \\text{\1}", _PERCENT.sub(r"\\%", text))
    text = _SYMBOL.sub(lambda sign: f" \\text{{{sign[1] or sign[3]}{sign[2] or ''}}}", text)
    text = _CLOCK.sub(lambda half: f" \\text{{{half[1].lower()}m}}", _RATE.sub(_rate, text))
    if (rate := _UNIT_FRACTION.search(text)) and rate[1] in UNITS and rate[2] in UNITS:
        power = f"^{rate[3]}" if rate[3] else ""
        text = f"{text[: rate.start()]} \\text{{{rate[1]}/{rate[2]}}}{power}"
    words: list[str] = []
    value = text
    while tail := _TAIL.search(value):
        word = " ".join((tail["macro"] if tail["macro"] is not None else tail["word"]).split())
        rest = value[: tail.start()]
        if not _is_unit(word, bare=tail["macro"] is None, apart=value[tail.start() : tail.start() + 1] == " ", rest=rest):
            break
        words.insert(0, word + (tail["power"] or "").translate({ord(c): None for c in "^{} "}))
        value = rest.removesuffix("(") if (link := _LINK.search(rest)) is None else rest[: link.start()]
    if not words or not re.search(r"[\d}a-zA-Z)]", value):
        return Quantity(text)
    return _scaled(value.strip(), " ".join(words))


def listed(text: str) -> list[tuple[str, str]]:
    """Each number of a text with its word: two for `4 hours 30 minutes` or `30^\\circ, 60^\\circ`. Empty for another text."""
    parts, end = [], 0
    text = _LISTED_WORD.sub(r"\\text{\1}, ", text)
    while part := _PART.match(text, end):
        parts.append((part[1], (part[2] or part[3]).lower()))
        end = part.end()
    return [] if text[end:].strip() else parts


def total(parts: list[tuple[str, str]]) -> tuple[str, Fraction] | None:
    """The dimension and sum of parts of one quantity, as in `4 hours 30 minutes`. None for a list of quantities.

    The units of one quantity have one dimension, and each is smaller than the one before. `3 cm, 4 cm` is a list.
    """
    if not parts or any(unit not in UNITS for _, unit in parts):
        return None
    kinds, factors = {UNITS[unit][0] for _, unit in parts}, [UNITS[unit][1] for _, unit in parts]
    amounts = [_exact(number) for number, _ in parts]
    if len(kinds) != 1 or None in amounts or any(a <= b for a, b in pairwise(factors)):
        return None
    return kinds.pop(), sum((a * f for a, f in zip(amounts, factors, strict=True) if a is not None), Fraction(0))


def same_amounts(ours: list[tuple[str, str]], theirs: list[tuple[str, str]]) -> bool:
    """Whether two lists have the same quantities, in any order. An unknown word must be the same word."""
    return sorted(map(_amount, ours)) == sorted(map(_amount, theirs))


def without_words(parts: list[tuple[str, str]]) -> bool:
    """Whether the words of some amounts only name what is counted. A letter may be a variable, and a hedge is none."""
    changing = MAGNITUDES.keys() | _FACTORS.keys() | _HEDGES | _OPERATIONS | _LINKING
    return all(
        word in UNITS or (len(word) > 2 and word not in changing and word.removesuffix("s") not in changing) for _, word in parts
    )


def _amount(part: tuple[str, str]) -> tuple[str, Fraction]:
    number, word = part
    kind, factor = UNITS.get(word, (word.removesuffix("s"), Fraction(1)))
    return kind, (_exact(number) or Fraction(0)) * factor


def based(text: str) -> tuple[str, str] | None:
    """Digits and base of `4210_5`, `4210_{\\text{five}}` or `4210 base 5`. None for another text."""
    found = _BASED.fullmatch(text)
    base = found and (found[2] or found[3])
    base = base and _BASES.get(base, base)
    return (found[1].upper(), base) if found and base and base.isdigit() else None


def residue(text: str) -> tuple[str, str] | None:
    """The least residue and the modulus of `x \\equiv 5 \\pmod{7}` or `5 mod 7`. None for another text."""
    found = _RESIDUE.fullmatch(text)
    return (str(int(found[1]) % int(found[2])), found[2]) if found and int(found[2]) else None


def conflict(one: Quantity, other: Quantity) -> bool:
    """Whether both have units, of different things or of different sizes. Unknown words are none, and signs such as MHz are."""
    if one.kind is not None and other.kind is not None:
        return one.kind != other.kind
    mine, yours = (_SPELLED.get(amount.words, amount.words) for amount in (one, other))
    if not (_SIGN.fullmatch(mine) and _SIGN.fullmatch(yours)):
        return False
    factors = _factors(mine), _factors(yours)
    return None not in factors and factors[0] != factors[1]


def _factors(sign: str) -> list[tuple[object, str]] | None:
    """The parts of a unit's sign, `m/s2`, each with its power. None where one is no known unit."""
    sign = "/".join(_PARTS.get(part, part) for part in sign.split("/"))
    parts = [part.rstrip("0123456789") for part in sign.split("/")]
    powers = [part[len(word) :] for part, word in zip(sign.split("/"), parts, strict=True)]
    if not all(word in UNITS or word in _KNOWN for word in parts):
        return None
    return [(UNITS.get(word, word), power) for word, power in zip(parts, powers, strict=True)]


def same_size(one: Quantity, other: Quantity) -> bool:
    """Whether two plain numbers with different units of one dimension are the same: `1 m` and `100 cm`."""
    mine, yours = _exact(one.value), _exact(other.value)
    if mine is None or yours is None or one.kind is None or other.kind is None or one.kind[0] != other.kind[0]:
        return False
    return mine * one.kind[1] == yours * other.kind[1]


def is_number(text: str) -> bool:
    """Whether a text is one plain number: sign, digits, thousands' commas, a decimal part."""
    return bool(text) and text not in "+-" and _NUMBER.fullmatch(text) is not None


def _is_unit(word: str, bare: bool, apart: bool, rest: str) -> bool:
    parts = word.lower().split()
    if parts and parts[0] in _OPERATIONS and re.search(r"\d\s*\}?\s*$", rest):
        return False
    if set(parts) & (_LINKING | _HEDGES) or _OPEN_END.search(rest) or (parts and re.search(r"[^a-zA-Z .'/°()-]", word)):
        return False
    if re.search(r"\\text\s*\{", rest) and not re.search(r"(?:/|\}|\d|\s)\s*$", rest):
        return False
    if not bare:
        return bool(rest.strip())
    known = word in UNITS or word.lower() in UNITS or word.lower() in MAGNITUDES or word.lower() in _FACTORS
    rest = _NAMED.sub("", rest.strip())
    behind_a_number = is_number(rest) or re.match(r"[-+]?[\d,.]+(?:/\d+)? [a-zA-Z /]*$", rest + " ") is not None
    return known or (behind_a_number and apart and len(word) > 2) or (behind_a_number and word == "per")


def _scaled(value: str, words: str) -> Quantity:
    """A quantity whose magnitude words are part of its value. A word that changes the value unread makes it no number."""
    first, *rest = words.split() or [""]
    single = first.lower().removesuffix("s")
    if single in MAGNITUDES:
        return _scaled(f"{value} \\times 10^{{{MAGNITUDES[single]}}}", " ".join(rest))
    if single in _FACTORS:
        return (
            _scaled(f"{value} \\times {_FACTORS[single]}", " ".join(rest))
            if _FACTORS[single]
            else Quantity(f"{value} \\text{{{words}}}")
        )
    if any(word.lower().removesuffix("s") in MAGNITUDES for word in rest):
        return Quantity(f"{value} \\text{{{words}}}")
    return Quantity(value, words, UNITS.get(words) or UNITS.get(words.lower()))


def _exact(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", "").strip())
    except (ValueError, ZeroDivisionError):
        return None
