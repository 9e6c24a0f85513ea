"""Estimates of the gradient audit on synthetic gradients whose answers are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evidence.intervals import jackknife
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


def test_parts_of_blocks_that_are_the_blocks_change_nothing():
    flows = np.random.default_rng(3).standard_normal((3, 6, 40)) + np.eye(1, 40)
    whole, taken = directions.Products.of(flows), np.random.default_rng(4).multinomial(6, np.full(6, 1 / 6), 50)
    others = (flows[0].sum(0) - flows[0]) / 5
    parts = directions.Products.of_parts(flows, flows[0], np.einsum("kmp,mp->km", flows, others))
    found, expected = (vars(directions.estimates(made, taken)) for made in (parts, whole))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values)


def test_parts_of_blocks_take_the_push_of_the_whole_and_the_norms_of_the_part():
    """Blocks of four gradients each, of which one is the part. The share is that of one, and the push that of all four."""
    flows = np.random.default_rng(4).standard_normal((2, 8, 4, 30)) * 0.3 + np.eye(1, 30)
    whole, part, taken = flows.mean(2), flows[:, :, 0], np.ones((1, 8), int)
    others = (whole[0].sum(0) - whole[0]) / 7
    made = directions.Products.of_parts(part, whole[0], np.einsum("kmp,mp->km", whole, others))
    found = directions.estimates(made, taken)
    assert found.push == pytest.approx(directions.estimates(directions.Products.of(whole), taken).push)
    assert found.share == pytest.approx(directions.estimates(directions.Products.of(part), taken).share)
    assert found.cosine[0, 0] == pytest.approx(1)


def test_the_golden_step_of_adamw():
    """Three minibatches in two dimensions, each its own part; the gradient of accuracy is (2, 0) in all of them.

    Gradients (1, 1), (1, -1), (2, 0). Without the first: mean (1.5, -.5), root mean squares sqrt(2.5), sqrt(.5). The step is
    (.9487, -.7071), of norm 1.1832, so its cosine is .8018. Without the second it is the same, with + .7071. Without the third
    the mean is (1, 0): cosine 1. Mean .8679.
    Without two parts one gradient is left, and its step is its sign: (1, +-1), cosine .7071, or (1, 0), cosine 1. The first left
    out: pairs with the second (the third is left, 1) and with the third (the second is left, .7071).
    """
    flows = np.array([[[1.0, 1], [1, -1], [2, 0]]])
    value, without = directions.adamw(flows, np.array([[2.0, 0]] * 3), 0.0 + 1e-12)
    assert value == pytest.approx([(0.8018 + 0.8018 + 1) / 3], abs=1e-4)
    assert without[0] == pytest.approx([(1 + 0.7071) / 2, (1 + 0.7071) / 2, 0.7071], abs=1e-4)


def test_a_token_of_one_block_does_not_rule_adamws_step():
    """A rare token's weight has a gradient of 1 in one block and 1e-6 elsewhere, in float32. Differences of sums lost those."""
    rng = np.random.default_rng(7)
    flows = (np.eye(1, 40) + 0.3 * rng.standard_normal((2, 16, 40))).astype(np.float32)
    value, _ = directions.adamw(flows, flows[0], 1e-8)
    rare = np.full((2, 16, 20), -1e-6, np.float32)
    rare[:, 3] = 1
    seen, left = directions.adamw(np.concatenate([flows, rare], axis=2), np.concatenate([flows[0], 0 * rare[0]], axis=1), 1e-8)
    assert (seen > 0.5 * value).all()
    assert (np.abs(left - seen[:, None]) < 0.25).all()


def test_intervals_of_adamws_step_hold_the_truth():
    """200 synthetic audits. The truth is the mean of many; 16 minibatches with as much noise as signal."""
    rng, found = np.random.default_rng(6), []
    for flows in blocks(rng, 0.8, 1.0, 16, times=200):
        values, without = directions.adamw(flows, flows[0], 1e-8)
        found.append(jackknife(values[1], without[1]))
    truth = np.mean([one.value for one in found])
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.9


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


@pytest.mark.parametrize("count", [6, 16])
@pytest.mark.parametrize(("size", "noise"), [(60, 1.0), (1000, 2.0)])
def test_intervals_hold_the_truth(count, size, noise):
    """300 synthetic audits. A bootstrap over blocks held the cosine in 84 to 97 of 100."""
    rng, truth, held = np.random.default_rng(5), {"cosine": 0.8, "push": 0.8}, {}
    taken = directions.all_but_one(count)
    for flows in blocks(rng, 0.8, noise, count, size, times=300):
        drawn = directions.estimates(directions.Products.of(flows), taken)
        for name, true in truth.items():
            values = getattr(drawn, name)[:, 1]
            found = jackknife(values[0], values[1:])
            held.setdefault(name, []).append(found is not None and found.low <= true <= found.high)
    assert min(np.mean(held["cosine"]), np.mean(held["push"])) >= 0.94


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
    drawn = directions.estimates(directions.Products.of(flows), directions.all_but_one(count))
    plain, oracle, inverse = drawn.minibatch.T
    better, worse = oracle - plain, inverse - plain
    assert jackknife(better[0], better[1:]).low > 0
    assert jackknife(worse[0], worse[1:]).high < 0


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
def test_sums_of_classes_add_up_and_a_token_without_one_is_in_the_whole(num_classes, num_problems):
    rng = np.random.default_rng([num_classes, num_problems])
    problems = np.concatenate([np.arange(num_problems), rng.integers(0, num_problems, 50)])
    values, classes = rng.random(len(problems)), rng.integers(0, num_classes + 1, len(problems))
    found = directions.sums_by_class(values, classes - 1, problems, num_classes)
    np.testing.assert_allclose(found[:, -1], np.bincount(problems, values))
    np.testing.assert_allclose(found[:, :-1].sum(0), np.bincount(classes, values, num_classes + 1)[1:])
    assert found.shape == (num_problems, num_classes + 1)
