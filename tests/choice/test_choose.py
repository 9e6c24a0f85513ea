"""The choice of problems as a function of pass rates, seed and round, with values that can be calculated by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.choice.choose import Candidates, PassRates, drawn, expected_variance, num_further, walk
from pipeline.config import Source
from pipeline.problems.sources import epoch_indices


def rates(*pairs):
    """Pass rates from (correct, graded)."""
    correct, graded = np.array(pairs).reshape(-1, 2).T
    return PassRates(correct.copy(), graded.copy())


known = st.lists(st.integers(0, 8).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1, max_size=40)
sources = st.builds(
    lambda a, b, unmeasured, sampling: Source(pass_rate=(min(a, b), max(a, b)), unmeasured=unmeasured, sampling=sampling),
    *(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["kept", "left_out"]), st.sampled_from(["shuffled", "variance"])),
)


def test_bounds_are_included_and_problems_without_a_rate_are_kept_or_left_out():
    found = rates((0, 8), (1, 10), (3, 10), (9, 10), (8, 8), (0, 0))
    kept = Candidates.of(Source(pass_rate=(0.1, 0.9)), found)
    assert kept.fits.tolist() == [False, True, True, True, False, True]
    assert (kept.below, kept.above, kept.unmeasured) == (1, 1, 1)
    left_out = Candidates.of(Source(pass_rate=(0.3, 0.9), unmeasured="left_out"), found)
    assert left_out.fits.tolist() == [False, False, True, True, False, False]
    assert (left_out.below, left_out.above, left_out.unmeasured) == (2, 1, 1)


def test_the_latest_verdicts_of_a_problem_count():
    before, later = rates((1, 8), (2, 8), (0, 0)), rates((4, 4), (0, 0), (1, 2))
    now = before.updated(later)
    assert now.rate.tolist() == [1.0, 0.25, 0.5]
    assert np.isnan(before.rate[2])


def test_the_expected_variance_of_a_verdict_by_hand():
    """E[p(1-p)] of Beta(a, b) is ab / ((a+b)(a+b+1)): nothing known 1*1/(2*3), 1 of 2 is 2*2/(4*5), 0 of 8 is 1*9/(10*11)."""
    assert expected_variance(rates((0, 0), (1, 2), (0, 8))).tolist() == pytest.approx([1 / 6, 1 / 5, 9 / 110])


@given(st.integers(0, 8), st.integers(1, 8))
def test_the_expected_variance_is_the_integral_over_all_pass_rates(correct, graded):
    correct, p = min(correct, graded), (np.arange(100_000) + 0.5) / 100_000
    likely = p**correct * (1 - p) ** (graded - correct)
    assert expected_variance(rates((correct, graded)))[0] == pytest.approx((likely * p * (1 - p)).sum() / likely.sum(), rel=1e-6)


@given(known, sources, st.integers(0, 2**40), st.integers(0, 99), st.integers(0, 500), st.integers(1, 60))
def test_what_a_round_takes_fits_and_depends_on_seed_round_and_rates_alone(pairs, source, seed, number, start, count):
    one = Candidates.of(source, rates(*pairs))
    if not one.fits.any():
        return
    taken, end = one.first(seed, number, start, count)
    assert (taken, end) == Candidates.of(source, rates(*pairs)).first(seed, number, start, count)
    assert len(taken) == count
    assert one.fits[taken].all()
    more, behind = one.further(seed, number, end, 5, taken)
    assert len(more) == len(set(more)) == min(5, len(set(np.flatnonzero(one.fits)) - set(taken)))
    assert one.fits[more].all()
    assert not set(more) & set(taken)
    assert start <= end <= behind


@given(st.integers(1, 30), st.integers(0, 2**40), st.integers(0, 100), st.integers(1, 80))
def test_a_walk_over_problems_that_all_fit_is_the_order_of_epochs(size, seed, start, count):
    assert walk(np.ones(size, bool), seed, start, count) == (epoch_indices(size, seed, start, count).tolist(), start + count)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 2**40), st.lists(st.integers(1, 9), max_size=8))
def test_rounds_that_walk_on_take_every_problem_that_fits_once_an_epoch(fits, seed, counts):
    fits, place, taken = np.array(fits), 0, []
    if not fits.any():
        return
    for count in counts:
        some, place = walk(fits, seed, place, count)
        taken += some
    epoch = [i for i in epoch_indices(len(fits), seed, 0, 200 * len(fits)).tolist() if fits[i]]
    assert taken == epoch[: len(taken)]


def test_a_draw_has_chances_proportional_to_the_weights_and_a_problem_left_out_moves_no_other():
    """The first of weights 1, 2, 5 in 4000 rounds: shares .125, .25, .625; a binomial's standard deviation is at most .008."""
    fits, weights = np.ones(3, bool), np.array([1.0, 2.0, 5.0])
    first = np.bincount([drawn(fits, weights, 3, number)[0] for number in range(4000)]) / 4000
    assert first == pytest.approx([0.125, 0.25, 0.625], abs=0.04)
    many = np.arange(1.0, 51.0)
    order = drawn(np.ones(50, bool), many, 7, 2)
    some = np.arange(50) % 3 > 0
    assert drawn(some, many, 7, 2).tolist() == [i for i in order.tolist() if some[i]]


@pytest.mark.parametrize(
    ("signals", "asked", "most", "expected"),
    [
        (4, 4, 10, 0),  # enough
        (1, 4, 0, 0),  # none may be asked
        (2, 4, 10, 4),  # 2 lack; with (2 + 1) / (4 + 2) of the groups, 4 are likely to give them
        (3, 8, 10, 3),  # 1 lacks, of which 4 / 10 have a signal
        (0, 4, 10, 4),  # a time asks no more than a round
        (2, 4, 3, 3),  # nor more than is left of the most
        (3, 12, 10, 2),
        (0, 14, 10, 0),
    ],
)
def test_how_many_further_prompts_are_asked(signals, asked, most, expected):
    assert num_further(signals, asked, 4, most) == expected


@given(st.integers(1, 64), st.integers(0, 200), st.data())
def test_filling_ends_and_never_asks_more_than_it_may(wanted, most, data):
    signals, asked, times = data.draw(st.integers(0, wanted)), wanted, 0
    while count := num_further(signals, asked, wanted, most):
        asked, times = asked + count, times + 1
        signals += data.draw(st.integers(0, count))
        assert asked <= wanted + most
        assert times <= most
    assert signals >= wanted or asked == wanted + most
