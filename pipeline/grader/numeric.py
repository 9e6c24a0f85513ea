"""Numbers: whether two are the same, exactly or as decimals, and whether one is too large to be computed.

A tolerance is relative, so that a tiny reference is not the same as 0.
"""

from __future__ import annotations

import math
from typing import Any

from math_verify.grader import unwrap_fcs
from sympy import (
    Abs,
    Expr,
    Float,
    I,
    Integer,
    Integral,
    N,
    Pow,
    Product,
    Rational,
    Sum,
    binomial,
    ceiling,
    factorial,
    floor,
    nan,
    sign,
    zoo,
)

_DIGITS = 40
_TOLERANCE, _PLACES = 1.0001e-6, 6  # a decimal is right to six digits, or to six places as far as these are not all zeros
_POINTS = (0.7310585, 1.9142135, 2.7390341, 0.2718281, 3.6055512)
_MOST_DIGITS, _MOST_TERMS = 20_000, 10_000


class TooLarge(ArithmeticError):
    """A number with so many digits that nobody computes it."""


def is_number(form: Any) -> bool:
    """Whether a form is a number: an expression without variables."""
    return isinstance(form, Expr) and bool(form.is_number) and not form.free_symbols


def equal_numbers(gold: Any, given: Any, tolerance: float = _TOLERANCE) -> bool:
    """Whether two numbers are the same: exactly when both are exact, else to six digits or six places."""
    gold, given = _computed(gold), _computed(given)
    if isinstance(gold, Rational) and isinstance(given, Rational) and tolerance == _TOLERANCE:
        return bool(gold == given)
    a, b = N(gold, _DIGITS), N(given, _DIGITS)
    if not (a.is_finite and b.is_finite):
        return bool(gold == given) and not gold.has(zoo, nan)  # 1/0 and 2/0 have no value that could be the same
    apart, size = abs(a - b), max(abs(a), abs(b), key=float) if a.is_real and b.is_real else abs(a) + abs(b)
    if apart == 0:
        return True
    if tolerance != _TOLERANCE:
        return bool(apart <= tolerance * size)
    if not (gold.has(Float) or given.has(Float)):
        return bool(apart <= 10**-30 * size)
    to_places = bool(apart <= 10**-4 * size) and round(a, _PLACES) == round(b, _PLACES)
    return to_places or bool(apart <= (1e-12 if _is_decimal(gold) and _is_decimal(given) else _TOLERANCE) * size)


def _is_decimal(number: Any) -> bool:
    """Whether a number ends after some places when it is written as a decimal."""
    if isinstance(number, Rational):
        rest = int(number.q)
        for prime in (2, 5):
            while rest % prime == 0:
                rest //= prime
        return rest == 1
    return isinstance(number, Float)


def _computed(number: Any) -> Any:
    """A number with its powers and sums computed. Raises TooLarge for one that has too many digits or terms."""
    check_size(number)
    return N(number, 20) if number.has(Integral) else real_roots(number).doit()


def real_roots(form: Any) -> Any:
    """A form whose odd roots of negative numbers are real, as at school: the cube root of -8 is -2."""
    roots = {
        power: sign(power.base) ** power.exp.p * Abs(power.base) ** power.exp
        for power in form.atoms(Pow)
        if power.exp.is_Rational and power.exp.q % 2 == 1 and power.exp.q > 1 and not power.base.has(I)
    }
    return form.xreplace(roots) if roots else form


def check_size(form: Any) -> float:
    """About how many digits the numbers of a form have. Raises TooLarge above _MOST_DIGITS, as for 9^{9^9} or (10^9)!."""
    if isinstance(form, (Sum, Product)):
        _check_terms(form)
    args = [check_size(arg) for arg in getattr(form, "args", ())]
    digits = max(args, default=0.0)
    if isinstance(form, Integer):
        digits = int(form).bit_length() * 0.302
    elif isinstance(form, Pow) and form.is_number and form.base not in (0, 1, -1):
        digits = max(args[0], 1.0) * (10.0**300 if args[1] > 300 else max(1.0, abs(complex(form.exp))))
    elif isinstance(form, (factorial, binomial)) and form.args[0].is_number:
        number = 0.0 if args[0] > 5 else abs(complex(form.args[0]))
        digits = math.inf if args[0] > 5 else max(1.0, number * math.log10(number + 1))
    if digits > _MOST_DIGITS:
        raise TooLarge(f"a number of more than {_MOST_DIGITS} digits")
    return digits


def _check_terms(form: Any) -> None:
    """Raise TooLarge for a sum or product of numbers with more than _MOST_TERMS terms, unless it is infinite."""
    for _, low, high in (limits for limits in form.limits if len(limits) == 3):
        if low.is_number and high.is_number and (high - low).is_finite and high - low > _MOST_TERMS:
            raise TooLarge(f"more than {_MOST_TERMS} terms")


def _open_sums(form: Any) -> Any:
    """A form with its sums and products up to a variable in closed form, since these have values between whole numbers too."""
    opened = {part: part.doit() for part in form.atoms(Sum, Product) if part.free_symbols}
    return form.xreplace(opened) if opened else form


def _at(place: int, shift: int, rounds: bool) -> float:
    """The value of one variable at one point. Where formulas round, small numbers are too much alike, and whole ones matter."""
    value = _POINTS[(place + shift) % len(_POINTS)] * (1 + 0.1 * place)
    return value if not rounds else 37 * value if shift % 2 else float(round(37 * value))


def values(gold: Any, given: Any, sign: int = 1) -> list[tuple[complex, complex]]:
    """The values of two formulas at the points where both are finite. `sign` -1 makes every second variable negative."""
    gold, given = unwrap_fcs(gold), unwrap_fcs(given)
    check_size(gold), check_size(given)
    gold, given = _open_sums(real_roots(gold)), _open_sums(real_roots(given))
    names = sorted(gold.free_symbols | given.free_symbols, key=str)
    rounds = gold.has(floor, ceiling) or given.has(floor, ceiling)
    found = []
    for shift in range(len(_POINTS)):
        point = {name: Float(_at(i, shift, rounds) * (sign if i % 2 == 0 else 1), 30) for i, name in enumerate(names)}
        a, b = (form.evalf(30, subs=point, maxn=200) for form in (gold, given))
        if a.is_number and b.is_number and a.is_finite and b.is_finite:
            found.append((a, b))
    return found
