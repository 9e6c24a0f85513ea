"""Formulas: a plain LaTeX text as sympy objects. It is read as LaTeX only, and as a whole, by math-verify's parser."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from math_verify import parse
from math_verify.grader import is_equation, take_last_relation, unwrap_fcs
from math_verify.parser import LatexExtractionConfig
from sympy import (
    Eq,
    Expr,
    FiniteSet,
    Function,
    I,
    Intersection,
    MatAdd,
    MatMul,
    MatrixBase,
    Mul,
    Rational,
    Set,
    Symbol,
    Tuple,
    UnevaluatedExpr,
    Union,
)

from pipeline.answers.quantities import UNITS
from pipeline.grader.numeric import equal_numbers, is_number, values

_MOST_DEPTH = 30
_RELATION_SIGN = re.compile(r"<|>|\\[lg]eq(?![a-zA-Z])")
_JOINT = re.compile(r",|;|\\text\{\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])")
_BUILDER = re.compile(r"\\\{\s*\(?[^\\{}|:<>=]*(?:\\in\s*[^|:]*?)?\)?\s*(?:\\mid|\||:|\\colon)(.+)\\\}", re.DOTALL)
_MEMBER = re.compile(r"^\(?[a-zA-Z](?:_\{?\w\}?)?\)?\s*\\in(?![a-zA-Z])\s*(?=.)")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_GRID = re.compile(
    r"[\[(|]?\s*\\begin\{(?:array|matrix|smallmatrix)\}(?:\{[lcr| ]*\})?(.*?)\\end\{(?:array|matrix|smallmatrix)\}\s*[\])|]?",
    re.DOTALL,
)
_CASES = re.compile(r"\\begin\{(?:cases|aligned|gathered)\}(.*?)\\end\{(?:cases|aligned|gathered)\}", re.DOTALL)
_STRAY = re.compile(r"&\s*(?=\\\\|\\end\{cases\})")  # at the end of a row
_PIECEWISE = re.compile(r"(?:[a-zA-Z](?: ?\([a-zA-Z]\))? ?= ?)?\\begin\{cases\}((?:(?!\\begin).)*)\\end\{cases\}", re.DOTALL)
_CONDITIONED = re.compile(r"\\begin\{cases\}(?:(?!\\end\{cases\}).)*&(?! ?=)", re.DOTALL)
_WHEN = re.compile(r"^(?:\\text\{ ?)?(?:if|for|when)\b ?\}? ?")
_INNER_SIGNS = re.compile(r"[{(][^{}()]*\\pm(?![a-zA-Z])")
_PERCENT = re.compile(r"([^=+<>%,]*[^\d=+<>%,\s\\])\s*\\?%")
_ANGLE = re.compile(r"\\(sin|cos|tan|cot|sec|csc)\s*[({]?\s*(\d+(?:\.\d+)?)\s*\\text\{degrees\}\s*[)}]?")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\\text\{degrees\}")
_PLAIN_LOG = re.compile(r"\\log(?![a-zA-Z])(?!\s*_)")
_NO_NUMBER = re.compile(r"(?<![\d.])\d+ \d+/\d+")  # `2 4/3` is neither a mixed number nor a product
_CONSTANT = re.compile(r"(.+?) ?\+ ?[CK](?: ?_ ?\{?[01]\}?)?( ?[+-].*)?", re.DOTALL)
_LAST_LETTERS = re.compile(r"(?<=[\d}\s)])(?<!\\)([a-zA-Z]{1,8})$")

ANTIDERIVATIVE = Function("antiderivative")
CASES, CASE = Function("cases"), Function("case")


def read(text: str) -> list[Any] | None:
    """A plain LaTeX text as sympy objects, or None when it is not mathematics. It is read as LaTeX only, and as a whole.

    `a \approx b` gives both sides. A false statement, such as `7 = 5` or `5 \approx 7`, gives none.
    """
    if "\\begin{cases}" in text and "matrix}" not in text:
        text = _STRAY.sub("", text)
    if _CONDITIONED.search(text):
        return _piecewise(text)
    formula = _mathematics(text)
    if formula is not None and _INNER_SIGNS.search(formula) and formula.count("\\pm") == 1 and not _JOINT.search(formula):
        formula = ", ".join(formula.replace("\\pm", sign) for sign in "+-")  # the parser reads both signs outside braces only
    if formula is None or _depth(formula) > _MOST_DEPTH:  # the parser's time is exponential in the depth
        return None
    forms = _forms(formula)
    natural = _PLAIN_LOG.sub(r"\\ln ", formula)  # school's `\log` has the base 10, and a mathematician's has the base e
    natural_forms = (_forms(natural) or []) if natural != formula and forms else []
    return [*forms, *natural_forms, *_antiderivatives(natural)] if forms else forms


def _forms(formula: str) -> list[Any] | None:
    """`read` for one meaning of its signs."""
    sides = [side.strip() for side in re.split(r"\\approx(?![a-zA-Z])", formula) if side.strip()]
    forms = [_parse(side) for side in sides]
    if not forms or any(form is None for form in forms):
        return None
    if any(_is_false(form) for form in forms) or not all(_near(last(a), last(b)) for a, b in pairwise(forms)):
        return []
    return forms if len({is_number(last(form)) for form in forms}) == 1 else forms[-1:]


def _piecewise(text: str) -> list[Any] | None:
    """A function in cases as CASES of CASE(value, condition). None when a row has no value or no condition."""
    found = _PIECEWISE.fullmatch(text)
    rows = [row.split("&") for row in found[1].split("\\\\") if row.strip()] if found else []
    if not rows or any(len(row) != 2 or _depth(row[0]) > _MOST_DEPTH for row in rows):
        return None
    pairs = [((value := _mathematics(row[0].strip(" ,"))) and _parse(value), _when(row[1])) for row in rows]
    return None if any(value is None for value, _ in pairs) else [CASES(*(CASE(*pair) for pair in pairs))]


def _when(text: str) -> Any:
    """The condition of a case: a relation, a set, or words as a symbol."""
    text = _WHEN.sub("", text.strip(" ,.;"))
    formula = _mathematics(text) if _depth(text) <= _MOST_DEPTH else None
    form = _parse(formula) if formula else None
    said = re.sub(r"\\text|[{}\s]", "", text).casefold()
    return Symbol(f"when {said}") if form is None or isinstance(form, Expr) else form


def _antiderivatives(formula: str) -> list[Any]:
    """`x^2 + C`, a formula in one variable and a constant of integration, as ANTIDERIVATIVE(2x). The constant is any number."""
    found = _CONSTANT.fullmatch(formula)
    form = _parse(found[1] + (found[2] or "")) if found else None
    if not isinstance(form, Expr) or len(form.free_symbols) != 1:
        return []
    slope = form.diff(*form.free_symbols)
    return [ANTIDERIVATIVE(slope)] if slope.free_symbols else []


def _depth(text: str) -> int:
    """How deep the brackets of a text are nested."""
    depth = most = 0
    for sign in text:
        depth += (sign in "({[") - (sign in ")}]")
        most = max(most, depth)
    return most


def _mathematics(text: str) -> str | None:
    """The text without words that stand for nothing. None when words are left, since a parser would drop them."""
    text = _CASES.sub(lambda cases: re.sub(r"\\\\", ", ", cases[1].replace("&", "")).strip(" ,"), text)
    text = _GRID.sub(r"\\begin{pmatrix}\1\\end{pmatrix}", text)
    text = re.sub(r"\\langle\s*", "(", re.sub(r"\s*\\rangle", ")", text))
    if _TRIGONOMETRY.search(text):
        text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    text = _ANGLE.sub(r"\\\1(\\frac{\2\\pi}{180})", text)
    text = _TEXT.sub(lambda word: "" if word[1].strip() in UNITS else word[0], text)
    builder = _BUILDER.fullmatch(text)
    text = _MEMBER.sub("", builder[1].strip() if builder else text)
    if _NO_NUMBER.search(text) or any(
        word.strip() not in {"and", "or"} and len(word.strip()) > 1 for word in _TEXT.findall(text)
    ):
        return None
    return text.strip(" ,;") or None


def _parse(text: str) -> Any:
    """One sympy object, or None. Inequalities that are joined become one set."""
    parts = [part for part in _JOINT.split(text) if part.strip()]
    if len(parts) > 1 and all(map(_RELATION_SIGN.search, parts)) and (joined := _joined(text, parts)) is not None:
        return joined
    if (part := _PERCENT.fullmatch(text)) and (form := _parse(part[1])) is not None:
        return _hundredths(form)
    if "\\int" not in text:  # `dx` ends an integral
        text = _LAST_LETTERS.sub(lambda tail: "".join(letter if letter == "i" else f"{{{letter}}}" for letter in tail[1]), text)
    text = re.sub(r"(?<=\d)i(?![a-zA-Z])", " i", text)
    forms = parse(f"${text}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None)
    form = _usual(forms[0]) if forms and not isinstance(forms[0], str) else None
    if isinstance(form, FiniteSet) and text.startswith("\\{"):
        form.in_braces = True
    return form


def in_braces(form: Any) -> bool:
    """Whether a form is a set that was written as one, `\\{1, 2\\}`, and not the list `1, 2`."""
    return getattr(form, "in_braces", False)


def _hundredths(form: Any) -> Any:
    """A percentage in math-verify's form, which it reads of plain numbers only. None when the form is no expression."""
    return Mul(form, UnevaluatedExpr(Rational(1, 100)), evaluate=False) if isinstance(form, Expr) else None


def _usual(form: Any) -> Any:
    """A form with the imaginary unit in place of the variable i, which math-verify reads, and with sums of matrices computed."""
    form = form.doit() if isinstance(form, (MatAdd, MatMul)) else form
    return form.xreplace({symbol: I for symbol in form.free_symbols if symbol.name == "i"})


def _joined(text: str, parts: list[str]) -> Any:
    """The set of `x < 1 or x > 2` (union) or of `x > 1 and x < 2` (intersection). None when a part is no such relation."""
    sets = [as_set(_parse(part)) for part in parts]
    if any(one is None for one in sets):
        return None
    every = re.search(r"(?<![a-zA-Z])and(?![a-zA-Z])", text) is not None
    return Intersection(*sets) if every else Union(*sets)


def as_set(relation: Any) -> Any:
    """The real numbers for which a relation in one variable holds. None when it has none or several."""
    if isinstance(relation, Set):
        return relation
    try:
        return unwrap_fcs(relation).as_set()
    except Exception:
        return None


def _is_false(form: Any) -> bool:
    """Whether a form is an equation that cannot hold: `7 = 5`, `x = 2 + 3 = 6`, or a number and a matrix."""

    def differ(lhs: Any, rhs: Any) -> bool:
        """Whether two sides cannot be equal."""
        if is_number(lhs):
            return not equal_numbers(lhs, rhs, 1e-3) if is_number(rhs) else not isinstance(rhs, Symbol)
        return isinstance(lhs, (MatrixBase, Set, Tuple)) and isinstance(rhs, Expr)

    equations = [form] if isinstance(form, Eq) else [part for part in getattr(form, "_unsorted_args", ()) if isinstance(part, Eq)]
    return any(differ(equation.lhs, equation.rhs) for equation in equations)


def _near(one: Any, other: Any) -> bool:
    """Whether two sides of `\\approx` can both be meant: they differ by a hundredth at most, or a formula stands for a number."""
    if not (isinstance(one, Expr) and isinstance(other, Expr)):
        return False
    if is_number(one) and is_number(other):
        return equal_numbers(one, other, 0.01)
    if is_number(one) or is_number(other):
        return is_number(other)
    return all(abs(a - b) <= 0.01 * abs(a) for a, b in values(one, other))


def last(form: Any) -> Any:
    """What an equation ends with; another form as it is."""
    return take_last_relation(form).rhs if is_equation(form) else form
