"""Conditions behind an answer: what narrows it must be the same, and a domain may be left out or spelled in another way."""

from __future__ import annotations

import pytest

from pipeline.answers.conditions import condition_of, needed, unlike, without_condition


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        (r"for all x \in \mathbb{R}", "for all real numbers x", False),
        ("for any constant c", "for any real constant c", False),
        ("where n is a positive integer", "for some positive integer n", False),
        (r"for all n\geq 1", r"for all integers n \geq 1", False),
        ("where k is odd", "where k is even", True),
        ("where k is odd", "for all k", True),
        ("where k = 5", "where k=7", True),
        ("where a=1, b=2", "where a=2, b=1", True),
        ("for all x > 0", "for all x < 0", True),
        ("for all positive x", "for all negative x", True),
        (r"for all n \in \mathbb{Z}", r"for all n \in \mathbb{N}", True),
    ],
)
def test_conditions_are_unlike_where_they_narrow_in_other_ways(one, other, differ):
    assert unlike(one, other) is unlike(other, one) is differ


@pytest.mark.parametrize(
    ("text", "kept", "value"),
    [
        ("8 where x=2", False, "8"),
        ("2^k where k=5", True, "2^k"),
        ("x = 2 where y = 3", True, "x = 2"),
        (r"\frac{1}{x} for all x>0", False, r"\frac{1}{x}"),
        ("8", False, "8"),
    ],
)
def test_a_condition_is_needed_where_it_has_the_value_of_a_letter(text, kept, value):
    assert needed(condition_of(text), text) is kept
    assert without_condition(text) == value
