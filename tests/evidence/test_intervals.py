"""Intervals and tests: known values, coverage by simulation, what has no interval."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evidence import intervals


def test_the_interval_of_a_coin_is_the_known_one():
    values = np.repeat([0.0, 1.0], 200)
    found = intervals.bootstrap(values)
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_an_interval_holds_its_mean(values):
    found = intervals.bootstrap(np.array(values))
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9


@pytest.mark.parametrize("values", [[], [1.0], [1.0, np.nan]])
def test_fewer_than_two_problems_have_no_interval(values):
    with pytest.raises(ValueError, match="too few for an interval"):
        intervals.bootstrap(np.array(values))


def test_resamples_without_a_value_leave_while_they_are_few():
    drawn = np.array([1.0, *np.linspace(0, 2, 9), math.nan])
    found = intervals.estimate(drawn)
    assert (found.value, found.low, found.high) == (1.0, 0.0, 2.0)
    assert intervals.estimate(np.array([1.0, 1.0, math.nan])) is None
    assert intervals.estimate(np.array([math.nan, 1.0, 1.0])) is None


def test_a_bound_is_a_value_of_a_resample_and_may_be_infinite():
    drawn = np.array([1.0, *np.linspace(0, 1, 97), *[math.inf] * 3])
    assert intervals.estimate(drawn).high == math.inf
    assert intervals.estimate(drawn, bounded=True) is None
    assert intervals.estimate(drawn[:-3], bounded=True).high <= 1.0


# ---- over seeds


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_an_interval_over_seeds_is_as_wide_as_the_tables_say(freedom, t):
    """Problems all alike: the standard error is that of the seeds' means, and a mean of t errors has p 0.05."""
    means = np.random.default_rng(freedom).normal(0, 1, freedom + 1)
    error = means.std(ddof=1) / math.sqrt(freedom + 1)
    means += t * error - means.mean()
    found = intervals.over_seeds(np.repeat(means[:, None], 3, axis=1))
    assert found.high - found.value == pytest.approx(t * error, rel=2e-4)
    assert found.value - found.low == pytest.approx(t * error, rel=2e-4)
    assert found.p == pytest.approx(0.05, abs=5e-5)


def test_holm_raises_the_least_most():
    assert intervals.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert intervals.holm([]) == []


def test_a_mean_over_seeds_covers_the_truth_as_often_as_it_says():
    """Seeds and problems both random: of 400 intervals 95 % at least hold 0; those over problems alone hold it far less often."""
    rng, held, naive = np.random.default_rng(3), 0, 0
    for _ in range(400):
        values = rng.normal(0, 1, (5, 1)) + rng.normal(0, 2, (1, 40)) + rng.normal(0, 1, (5, 40))
        found = intervals.over_seeds(values)
        held += found.low <= 0 <= found.high
        by_problem = values.mean(0)
        naive += abs(by_problem.mean()) < 2 * by_problem.std(ddof=1) / math.sqrt(40)
    assert 0.94 <= held / 400 <= 0.995, held  # 395: S - 1 degrees for the problems' share too err on the careful side
    assert naive < held


def test_p_and_interval_agree():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.5, 2.0):
        found = intervals.over_seeds(rng.normal(shift, 1, (4, 30)))
        assert (found.p < 0.05) == (not found.low <= 0 <= found.high)


def test_one_seed_says_nothing_of_training():
    found = intervals.over_seeds(np.array([[0.0, 1.0, 1.0, np.nan]]))
    assert (found.value, found.p) == (pytest.approx(2 / 3), None)
    same = intervals.over_seeds(np.zeros((3, 4)))
    assert (same.value, same.p) == (0.0, 1.0)
