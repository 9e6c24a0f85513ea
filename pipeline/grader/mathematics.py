"""Whether two answers in LaTeX are the same by mathematics. A hostile answer may take for ever, so `judging.py` asks in a child.

Numbers and formulas are compared by their values. Sets, tuples, matrices and intervals are compared part by part. math-verify
decides what is left, such as equations.
"""

from __future__ import annotations

from typing import Any

from math_verify import verify
from math_verify.grader import get_pct_val, is_assignment_relation, is_equation, is_relation, take_last_relation
from sympy import (
    Eq,
    Expr,
    FiniteSet,
    Float,
    Interval,
    MatrixBase,
    Poly,
    PolynomialError,
    Set,
    Symbol,
    Tuple,
    Union,
    numer,
    together,
)

from pipeline.grader.formulas import ANTIDERIVATIVE, CASE, CASES, as_set, in_braces, last, read
from pipeline.grader.numeric import check_size, equal_numbers, is_number, values


def judge(answer: str, reference: str, set_relations: bool = True) -> str:
    """'correct', 'wrong', 'unparsable', or 'unreadable' for a reference that is not mathematics. Both are plain LaTeX."""
    gold, given = read(reference), read(answer)
    if not gold:
        return "unreadable"
    return "unparsable" if given is None else "correct" if same(gold, given, set_relations) else "wrong"


def same(gold: list[Any], given: list[Any], set_relations: bool = True) -> bool:
    r"""Whether one of the forms that `read` gave for the reference is the same as one of the answer's.

    set_relations: whether `x < 3` and `(-\infty, 3)` are the same.
    """
    return any(_same_percent(one, other, set_relations) for one in gold for other in given)


def _same_percent(gold: Any, given: Any, set_relations: bool) -> bool:
    """50 % is the same as 50 and as 0.5, but 0.5 % is not the same as 50."""
    mine, yours = get_pct_val(gold), get_pct_val(last(given))
    if (mine is None) == (yours is None):
        return _same(gold if mine is None else mine, given if yours is None else yours, set_relations)
    if mine is not None:
        return _same(mine, given, set_relations) or _same(mine / 100, given, set_relations)
    return _same(gold, yours, set_relations) or _same(gold, yours / 100, set_relations)


def _same(gold: Any, given: Any, set_relations: bool) -> bool:
    kinds = [getattr(form, "func", None) for form in (gold, given)]
    if CASES in kinds or CASE in kinds:
        compared = _in_any_order if CASES in kinds else _in_order
        return kinds[0] == kinds[1] and compared(gold.args, given.args, set_relations)
    gold, given = _points(gold), _points(given)
    mine, yours = _assigned(gold), _assigned(given)
    if mine is not None and yours is not None:
        return mine.keys() == yours.keys() and _in_order(mine.values(), [yours[name] for name in mine], set_relations)
    gold, given = _answers(*_unnamed(gold, given, mine, yours))
    related = is_relation(gold) or is_relation(given)
    if isinstance(gold, Set) != isinstance(given, Set) and set_relations:
        gold = as_set(gold) or gold if is_relation(gold) else gold
        given = as_set(given) or given if is_relation(given) else given
    if (
        isinstance(gold, (Set, Tuple))
        or isinstance(given, (Set, Tuple))
        or isinstance(gold, MatrixBase)
        or isinstance(given, MatrixBase)
    ):
        return not (related and _is_end_points(gold, given)) and _same_parts(gold, given, set_relations)
    if isinstance(gold, Eq) and isinstance(given, Eq):
        return _same_equation(gold, given) or (_is_simple(gold, given) and _by_math_verify(gold, given, set_relations))
    if is_relation(gold) and is_relation(given) and gold.free_symbols == given.free_symbols and len(gold.free_symbols) == 1:
        mine, yours = as_set(gold), as_set(given)
        if mine is not None and yours is not None:
            return _same_parts(mine, yours, set_relations)
    if is_relation(gold) or is_relation(given) or is_equation(gold):
        return _by_math_verify(gold, given, set_relations)
    if is_number(gold) and is_number(given):
        return equal_numbers(gold, given)
    slopes = [form.args[0] for form in (gold, given) if getattr(form, "func", None) == ANTIDERIVATIVE]
    if slopes:
        return len(slopes) == 2 and _equal_formulas(*slopes) is True
    equal = None if isinstance(gold, Symbol) or isinstance(given, Symbol) else _equal_formulas(gold, given)
    return _by_math_verify(gold, given, set_relations) if equal is None else equal


def _points(form: Any) -> Any:
    """`x = 1, y = 2 or x = 3, y = 4` as the set of its points, with values in the order of their names. Another form as it is."""
    parts = (_parts(form) or ()) if isinstance(form, FiniteSet) else ()
    points: list[dict[Any, Any]] = [{}]
    for part in parts:
        if not (isinstance(part, Eq) and isinstance(part.lhs, Symbol)):
            return form
        if part.lhs in points[-1]:
            points.append({})
        points[-1][part.lhs] = part.rhs
    if len(points) < 2 or len(points[0]) < 2 or any(point.keys() != points[0].keys() for point in points):
        return form
    return FiniteSet(*(Tuple(*(point[name] for name in sorted(point, key=str))) for point in points))


def _assigned(form: Any) -> dict[Any, Any] | None:
    """The values of `a = 2, b = 3` or `(a, b) = (2, 3)` by their symbols, as they are written. None for another form."""
    if isinstance(form, Eq) and all(isinstance(side, (Tuple, Interval)) for side in form.args):
        names, amounts = _parts(form.lhs) or (), _parts(form.rhs) or ()
        pairs = list(zip(names, amounts, strict=True)) if len(names) == len(amounts) else []
    else:
        parts = (_parts(form) or ()) if isinstance(form, FiniteSet) else ()
        pairs = [(part.lhs, part.rhs) if isinstance(part, Eq) else (None, None) for part in parts]
    named = len({name for name, _ in pairs}) == len(pairs) > 1 and all(isinstance(name, Symbol) for name, _ in pairs)
    return dict(pairs) if named else None


def _unnamed(gold: Any, given: Any, mine: dict[Any, Any] | None, yours: dict[Any, Any] | None) -> tuple[Any, Any]:
    """Both as tuples where only one of them names its values. The order is that of the reference, if it has one.

    Coordinates and listed equations stand in the order of their names, since nobody asked for the order in which they came.
    """
    if mine is not None and isinstance(gold, FiniteSet) and isinstance(given, FiniteSet) and _is_roots(mine):
        return FiniteSet(*mine.values()), given
    if mine is not None:
        return Tuple(*mine.values()), given
    if yours is None or isinstance(gold, FiniteSet):
        return gold, given
    by_name = isinstance(given, FiniteSet) or {str(name) for name in yours} <= {"x", "y", "z"}
    return gold, Tuple(*(yours[name] for name in (sorted(yours, key=str) if by_name else yours)))


def _is_roots(named: dict[Any, Any]) -> bool:
    """Whether values are named by one letter with indices, `x_1` and `x_2`: the roots of one equation, which have no order."""
    return all("_" in str(name) for name in named) and len({str(name).partition("_")[0] for name in named}) == 1


def _answers(gold: Any, given: Any) -> tuple[Any, Any]:
    """Both without the `x =` that only one of them has."""
    if is_equation(given) and not is_equation(gold):
        last = take_last_relation(given)
        turned = isinstance(given, Eq) and isinstance(last.rhs, Symbol) and is_number(last.lhs)
        return gold, last.lhs if turned else last.rhs
    if is_assignment_relation(gold) and not is_equation(given):
        return take_last_relation(gold).rhs, given
    return gold, given


def _same_parts(gold: Any, given: Any, set_relations: bool) -> bool:
    """Sets, tuples, intervals and matrices, part by part."""
    if isinstance(gold, Interval) and isinstance(given, Interval):
        sides = gold.left_open == given.left_open and gold.right_open == given.right_open
        return sides and _same(gold.start, given.start, set_relations) and _same(gold.end, given.end, set_relations)
    if isinstance(gold, MatrixBase) and isinstance(given, MatrixBase):
        return gold.shape == given.shape and _in_order(gold.flat(), given.flat(), set_relations)
    gold, given = _vector(gold, given), _vector(given, gold)
    if isinstance(gold, Union) and isinstance(given, Union) and _in_any_order(gold.args, given.args, set_relations):
        return True
    mine, yours = _parts(gold), _parts(given)
    if mine is not None and yours is not None:
        if _is_end_points(gold, given) and (
            in_braces(gold) or in_braces(given) or any(isinstance(part, Eq) for part in (*mine, *yours))
        ):
            return False
        unordered = isinstance(gold, FiniteSet)
        yours = _once(yours) if unordered else yours
        if not unordered and any(isinstance(part, Eq) for part in yours):
            return False  # `x = 1, x = 2` has no order
        return _in_any_order(mine, yours, set_relations) if unordered else _in_order(mine, yours, set_relations)
    if isinstance(gold, Tuple) or isinstance(given, (Tuple, MatrixBase)) or isinstance(gold, MatrixBase):
        return False
    return _by_math_verify(gold, given, set_relations)


def _parts(form: Any) -> tuple[Any, ...] | None:
    """The parts of a tuple, a list, a column, or of `(1,2)`, which reads as an interval. None when there are none."""
    if isinstance(form, Interval):
        return (form.start, form.end) if form.left_open and form.right_open else None
    if isinstance(form, MatrixBase):
        return tuple(form.flat()) if 1 in form.shape else None
    if isinstance(form, FiniteSet):
        return tuple(getattr(form, "_unsorted_args", form.args))
    return None if isinstance(form, Set) else form.args if isinstance(form, Tuple) else (form,)


def _is_end_points(gold: Any, given: Any) -> bool:
    """Whether one form is an interval and the other one two or more points, which may be its ends."""
    one, other = (gold, given) if isinstance(gold, Interval) else (given, gold)
    return isinstance(one, Interval) and isinstance(other, (FiniteSet, Tuple, MatrixBase))


def _vector(form: Any, other: Any) -> Any:
    """`[1, 2]`, which reads as an interval, as a vector where the other form is a row or a column. Another form as it is."""
    if not (isinstance(form, Interval) and isinstance(other, MatrixBase)) or form.left_open or form.right_open:
        return form
    return Tuple(form.start, form.end)


def _once(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Points without those that are listed twice. Other parts as they are: a root may be counted twice.

    `(1,2)` reads as an interval.
    """
    points = all(isinstance(part, (Tuple, Interval)) for part in parts)
    return tuple(dict.fromkeys(parts)) if points else parts


def _in_order(mine: Any, yours: Any, set_relations: bool) -> bool:
    return len(mine) == len(yours) and all(_same_percent(a, b, set_relations) for a, b in zip(mine, yours, strict=True))


def _in_any_order(mine: Any, yours: Any, set_relations: bool) -> bool:
    left = list(yours)
    if len(mine) != len(left):
        return False
    for part in mine:
        match = next((i for i, other in enumerate(left) if _same_percent(part, other, set_relations)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_equation(gold: Any, given: Any) -> bool:
    """Whether one equation is the other one times a number: `y = 2x + 1` and `2x - y + 1 = 0`."""
    left, right = gold.lhs - gold.rhs, given.lhs - given.rhs
    if left.free_symbols != right.free_symbols or not left.free_symbols:
        return False
    ratios = [a / b for a, b in values(left, right) if abs(b) > 1e-12]
    return len(ratios) >= 4 and all(abs(ratio - ratios[0]) <= 1e-15 * abs(ratios[0]) for ratio in ratios) and ratios[0] != 0


def _is_simple(*equations: Any) -> bool:
    """Whether math-verify solves the equations in a moment: polynomials or their quotients of low degree, sets, tuples."""
    for equation in equations:
        if not (isinstance(equation.lhs, Expr) and isinstance(equation.rhs, Expr)):
            continue
        left = equation.lhs - equation.rhs
        try:
            if len(left.free_symbols) > 3 or Poly(numer(together(left)), *left.free_symbols).total_degree() > 4:
                return False
        except PolynomialError:
            return False
    return True


def _equal_formulas(gold: Any, given: Any) -> bool | None:
    """Whether two formulas have the same values at several points. None when that does not decide it.

    Formulas that differ where all variables are positive are different. Those that agree there and differ elsewhere, such as
    sqrt(ab) and sqrt(a) sqrt(b), are left to algebra.
    """
    if not (isinstance(gold, Expr) and isinstance(given, Expr)):
        return None
    exact = not (gold.has(Float) or given.has(Float))

    def agree(a: Any, b: Any) -> bool:
        """Whether two values are equal up to the digits that the formulas have."""
        return bool(abs(a - b) <= (1e-25 if exact else 1e-6) * max(abs(a), abs(b), 1e-30))

    positive = [agree(a, b) for a, b in values(gold, given)]
    if len(positive) < 3:
        return None
    if not all(positive):
        return False if not any(positive) else None
    return True if all(agree(a, b) for a, b in values(gold, given, -1)) else None


def _by_math_verify(gold: Any, given: Any, set_relations: bool) -> bool:
    check_size(gold), check_size(given)
    return bool(verify([gold], [given], timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=set_relations))
