"""Rewards and advantages: literal figures, rejected rows, state that adds up."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.method.rewards import RunningBaseline, group_advantage, length_shaped_reward, soft_overlong, weighted_sum

NAN = float("nan")
reward_lists = st.lists(st.one_of(st.just(NAN), st.just(0.0), st.floats(1.0, 1.5)), max_size=12)


def test_reward_rises_as_a_correct_trace_shortens() -> None:
    rewards = length_shaped_reward(np.array([True, True, True, False]), np.array([0, 512, 1024, 10]), 1024, 0.5)
    assert rewards.tolist() == [1.5, 1.25, 1.0, 0.0]
    assert length_shaped_reward(np.array([True]), np.array([7]), 1024, 0.0).tolist() == [1.0]
    assert length_shaped_reward(np.empty(0, bool), np.empty(0, int), 1024, 0.5).shape == (0,)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 100)), min_size=1, max_size=20), st.floats(0, 2))
@settings(max_examples=50, deadline=None)
def test_reward_is_zero_or_at_least_one(rows: list[tuple[bool, int]], beta: float) -> None:
    correct, lengths = map(np.array, zip(*rows, strict=True))
    rewards = length_shaped_reward(correct, lengths, 100, beta)
    assert (rewards[~correct] == 0).all()
    assert ((rewards[correct] >= 1) & (rewards[correct] <= 1 + beta)).all()


def test_reward_refuses_lengths_beyond_the_cap() -> None:
    with pytest.raises(ValueError, match=r"num_tokens: 5 \.\. 11"):
        length_shaped_reward(np.array([True, False]), np.array([5, 11]), 10, 0.5)
    with pytest.raises(ValueError, match="num_tokens: shape"):
        length_shaped_reward(np.array([True, False]), np.array([5]), 10, 0.5)


def test_soft_overlong_by_hand() -> None:
    # limit 20, cache 8: nothing up to 12, then (12 - T) / 8, and -1 from 20 on
    assert soft_overlong(np.array([0, 12, 14, 16, 20, 25]), 20, 8).tolist() == [0, 0, -0.25, -0.5, -1, -1]
    with pytest.raises(ValueError, match=r"cache: 21, expected 1 \.\. max_tokens = 20"):
        soft_overlong(np.array([1]), 20, 21)


def test_a_weighted_sum_leaves_absent_rewards_out() -> None:
    values = np.array([[1.0, NAN, NAN, 2.0], [4.0, -2.0, NAN, 0.0]])
    found = weighted_sum(values, np.array([1.0, 0.5]))  # 1 + 2; -1; nothing; 2
    np.testing.assert_array_equal(found, [3.0, -1.0, NAN, 2.0])
    with pytest.raises(ValueError, match="weights: shape"):
        weighted_sum(values, np.ones(3))


def test_a_reward_that_is_only_stored_makes_no_absent_reward_a_zero() -> None:
    values = np.array([[1.0, NAN], [7.0, 7.0]])
    np.testing.assert_array_equal(weighted_sum(values, np.array([1.0, 0.0])), [1.0, NAN])


def test_group_advantage_by_hand() -> None:
    # group 1: mean .5, population std .5; group 2: all equal, no signal; group 3: one row rejected, mean 1.1, std .1
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 0, 0, 0, 0, 1.0, NAN, 1.2, NAN])
    high, small = 0.5 / 0.5001, 0.1 / 0.1001
    expected = [high, -high, -high, high, 0, 0, 0, 0, -small, NAN, small, NAN]
    np.testing.assert_allclose(group_advantage(rewards, 4), expected, rtol=1e-12)


def test_a_sample_spread_divides_by_one_less() -> None:
    # deviations of .5 four times: population std .5, sample std sqrt(1 / 3) = .57735, 1.155 times as large
    found, sample = (group_advantage(np.array([1.0, 0.0, 0.0, 1.0]), 4, std) for std in ("population", "sample"))
    np.testing.assert_allclose(sample, [s * 0.5 / (3**-0.5 + 1e-4) for s in (1, -1, -1, 1)], rtol=1e-12)
    assert found[0] / sample[0] == pytest.approx(1.1547, abs=1e-3)
    np.testing.assert_array_equal(group_advantage(np.array([1.2, NAN, 1.0, 1.0]), 2, "sample"), [0, NAN, 0, 0])  # one row left


def test_group_advantage_of_equal_rewards_is_exactly_zero() -> None:
    assert (group_advantage(np.full(7, 1.4995), 7) == 0).all()  # seven of them added up and divided by 7 give 1.49949...98
    assert (group_advantage(np.full(7, 100000.1), 7) == 0).all()  # 1.5e-7 in every place before: own rewards have any scale
    assert group_advantage(np.array([1.3]), 1).tolist() == [0.0]
    assert np.isnan(group_advantage(np.full(3, NAN), 3)).all()
    assert group_advantage(np.empty(0), 8).shape == (0,)


@given(reward_lists, st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_group_advantage_does_not_depend_on_the_order_of_groups(rewards: list[float], size: int, seed: int) -> None:
    values = np.array(rewards * size)
    ids = np.repeat(np.arange(len(rewards)), size)
    found = group_advantage(values, size)
    order = np.random.default_rng(seed).permutation(len(rewards))
    moved = (order[:, None] * size + np.arange(size)).ravel()  # whole groups change places
    np.testing.assert_allclose(group_advantage(values[moved], size), found[moved], atol=1e-12)
    assert np.array_equal(np.isnan(found), np.isnan(values))
    for group in range(len(rewards)):
        known = found[ids == group][~np.isnan(found[ids == group])]
        assert abs(known.sum()) < 1e-9
        assert not known.size or known.std() <= 1


def test_group_advantage_refuses_torn_groups() -> None:
    with pytest.raises(ValueError, match="5 rows do not divide into groups of 2"):
        group_advantage(np.zeros(5), 2)
    with pytest.raises(ValueError, match="rewards: shape"):
        group_advantage(np.zeros((5, 2)), 2)


@given(st.lists(reward_lists, max_size=6))
@settings(max_examples=80, deadline=None)
def test_running_baseline_equals_the_whole_history(steps: list[list[float]]) -> None:
    state = RunningBaseline()
    for rewards in steps:
        state = state.update(np.array(rewards))
    history = np.array([r for rewards in steps for r in rewards if not np.isnan(r)])
    assert (state.count, state.steps) == (history.size, len(steps))
    if history.size:
        assert state.mean == pytest.approx(history.mean(), abs=1e-12)
        assert state.std == pytest.approx(history.std(), abs=1e-7)
    assert RunningBaseline.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_running_advantage_waits_ten_steps_then_standardises() -> None:
    state, rewards = RunningBaseline(), np.array([1.5, 0.0, NAN])
    for _ in range(10):
        np.testing.assert_array_equal(state.advantage(rewards), [1.0, -0.5, NAN])
        state = state.update(np.array([0.0, 1.0, 0.0, 1.0]))
    assert state.steps == 10
    np.testing.assert_allclose(state.advantage(rewards), [2.0, -1.0, NAN])  # mean .5, std .5 of *earlier* steps
    np.testing.assert_allclose(RunningBaseline().advantage(rewards, 0), [1.0, -0.5, NAN])  # nothing seen yet


def test_running_advantage_without_spread_is_finite() -> None:
    state = RunningBaseline().update(np.full(9, 0.1) * 3)
    assert state.advantage(np.array([0.3, 1.3]), 0).tolist() == pytest.approx([0.0, 1.0])
    assert RunningBaseline().std == 0
    before = RunningBaseline(3, 0.5, 0.2, 1)
    before.update(np.ones(3))
    assert before == RunningBaseline(3, 0.5, 0.2, 1)
