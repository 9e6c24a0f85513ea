"""Estimates of the gradient audit on synthetic gradients whose answers are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.method import directions


def blocks(rng, cosine, noise, count, size=60, times=1):
    """Gradients [times][2, M, P] of a reference and a weighting at `cosine` to it, with noise that is partly common."""
    true = np.zeros((2, size))
    true[0, 0] = 1
    true[1, :2] = cosine, np.sqrt(1 - cosine**2)
    common = rng.standard_normal((times, 1, count, size))
    own = rng.standard_normal((times, 2, count, size))
    return true[:, None] + noise * (0.8 * common + 0.6 * own) / np.sqrt(size)


def test_the_golden_figures_of_three_blocks():
    """Reference (1, 0), (3, 0), (2, 0); weighting (0, 1), (4, 3), (2, 2). Means over the six pairs of different blocks:

    reference (3 + 2 + 6) / 3 = 11 / 3. Own: (0 4 + 1 3) + (0 2 + 1 2) + (4 2 + 3 2) = 3 + 2 + 14, / 3 = 19 / 3.
    Cross: 0 3 + 0 2 + 4 1 + 4 2 + 2 1 + 2 3 = 20, / 6 = 10 / 3. Cosine (10 / 3) / sqrt(19 / 3 x 11 / 3) = .6917.
    Norms^2 1, 25, 8, mean 34 / 3: share 19 / 34. Block cosines: 0, 4 x 1.5 / 5, 2 x 2 / sqrt 8, mean .8714, / sqrt(11 / 3).
    """
    flows = np.array([[[1.0, 0], [3, 0], [2, 0]], [[0, 1], [4, 3], [2, 2]]])
    found = directions.estimates(directions.Products.of(flows), np.ones((1, 3), int))
    assert found.cosine[0] == pytest.approx([1, 10 / 3 / np.sqrt(19 / 3 * 11 / 3)])
    assert found.share[0, 1] == pytest.approx(19 / 34)
    assert found.push[0] == pytest.approx([1, 10 / 11])
    assert found.minibatch[0, 1] == pytest.approx((0 + 6 / 5 + 4 / np.sqrt(8)) / 3 / np.sqrt(11 / 3))


@pytest.mark.parametrize("cosine", [0.95, 0.4, -0.3])
def test_estimates_are_free_of_the_noise_that_both_gradients_share(cosine):
    """32 blocks with as much noise as signal. The plain cosine of the means is drawn towards the common noise; ours is not."""
    rng, ours, plain, share = np.random.default_rng(1), [], [], []
    for flows in blocks(rng, cosine, 2.0, 32, times=150):
        found = directions.estimates(directions.Products.of(flows), np.ones((1, 32), int))
        ours.append(found.cosine[0, 1])
        share.append(found.share[0, 1])
        one, other = flows.mean(1)
        plain.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    assert np.mean(ours) == pytest.approx(cosine, abs=0.015)
    assert abs(np.mean(plain) - cosine) > abs(np.mean(ours) - cosine)
    assert np.mean(share) == pytest.approx(1 / (1 + 4), abs=0.01)


def test_intervals_hold_the_true_cosine():
    """120 synthetic audits of 16 blocks: about 95 % of the intervals hold the truth."""
    rng, held = np.random.default_rng(5), 0
    taken = directions.choices(16, resamples=200)
    for flows in blocks(rng, 0.9, 1.0, 16, times=120):
        drawn = directions.estimates(directions.Products.of(flows), taken).cosine[1:, 1]
        low, high = np.nanquantile(drawn, (0.025, 0.975))
        held += low <= 0.9 <= high
    assert 0.87 <= held / 120 <= 1.0


def test_an_oracle_wins_and_its_inverse_loses_outside_the_intervals():
    """Token classes with a known answer: only tokens of class 0 carry the direction of accuracy, all others carry noise.

    The oracle weighs class 0 alone, its inverse all others. The plain weighting weighs all tokens.
    """
    rng = np.random.default_rng(2)
    count, tokens, size = 24, 40, 80
    truth = np.zeros(size)
    truth[0] = 1
    decides = rng.random((count, tokens)) < 0.25
    gradients = rng.standard_normal((count, tokens, size)) * 0.3 + decides[..., None] * truth
    weights = np.stack([np.ones_like(decides), decides, ~decides]).astype(float)
    flows = np.einsum("kmt,mtp->kmp", weights, gradients)
    drawn = directions.estimates(directions.Products.of(flows), directions.choices(count))
    plain, oracle, inverse = drawn.minibatch.T
    low, high = np.nanquantile(oracle[1:] - plain[1:], (0.025, 0.975))
    assert low > 0, (low, high)
    low, high = np.nanquantile(inverse[1:] - plain[1:], (0.025, 0.975))
    assert high < 0, (low, high)


def test_a_weighting_without_a_direction_has_no_figures():
    flows = np.zeros((2, 4, 3))
    flows[0] = 1.0
    found = directions.estimates(directions.Products.of(flows), np.ones((1, 4), int))
    assert np.isnan(found.cosine[0, 1])
    assert found.push[0, 1] == 0
    with pytest.raises(ValueError, match="three blocks"):
        directions.Products.of(flows[:, :2])


def test_the_baseline_leaves_the_trace_out():
    """Verdicts 1 0 0 of one problem: 1 - 0, 0 - 1/2, 0 - 1/2. With one trace each, the other problems are the baseline."""
    found = directions.leave_one_out(np.array([1, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1]))
    assert found == pytest.approx([1, -0.5, -0.5, 0, 0])
    assert directions.leave_one_out(np.array([1, 0, 0]), np.arange(3)) == pytest.approx([1, -0.5, -0.5])
    assert directions.leave_one_out(np.array([1, 0, 1]), np.array([0, 0, 1]))[2] == 0


def test_noise_falls_with_the_traces_of_a_minibatch():
    """Share .2 in 10 traces: the noise is 4 times the signal there, and as much as the signal in 40."""
    assert directions.in_minibatch(np.array(0.2), 10, 40) == pytest.approx(0.5)
    assert directions.in_minibatch(np.array(0.2), 10, 10) == pytest.approx(0.2)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(2, 8))
def test_shares_of_classes_add_up(num_classes, num_problems):
    rng = np.random.default_rng([num_classes, num_problems])
    problems = np.concatenate([np.arange(num_problems), rng.integers(0, num_problems, 50)])
    values, classes = rng.random(len(problems)), rng.integers(0, num_classes, len(problems))
    drawn = directions.shares_by_class(values, classes, problems, num_classes)
    assert drawn.sum(1) == pytest.approx(np.ones(len(drawn)))
    expected = np.bincount(classes, values, num_classes) / values.sum()
    assert drawn[0] == pytest.approx(expected)


def test_shares_of_a_sum_that_changes_its_sign_are_left_out():
    """Problems with sums 3, -1: drawing the second one twice gives -2."""
    drawn = directions.shares_by_class(np.array([3.0, -1.0]), np.array([0, 1]), np.array([0, 1]), 2)
    assert drawn[0] == pytest.approx([1.5, -0.5])
    assert 0.15 < np.isnan(drawn[1:, 0]).mean() < 0.35
