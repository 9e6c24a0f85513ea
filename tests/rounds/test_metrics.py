"""Figures and their intervals: known values, what is counted, what leaves the mean."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.rounds import metrics


def rollout_and_grade(verdicts, lengths, group=2, rejected=()):
    """A (rollout, grade) pair: one row per verdict, `group` rows a prompt."""
    count = len(verdicts)
    rollout = pa.table(
        {
            "prompt_index": pa.array([i // group for i in range(count)], pa.int32()),
            "response_tokens": pa.array([[1] * n for n in lengths], pa.list_(pa.int32())),
        }
    )
    reasons = ["verifier_timeout" if i in rejected else None for i in range(count)]
    rewards = [None if i in rejected else float(v == "correct") for i, v in enumerate(verdicts)]
    columns = {
        "reject_reason": pa.array(reasons, pa.string()),
        "verdict": pa.array(verdicts, pa.string()),
        "reward": pa.array(rewards, pa.float32()),
        "advantage": pa.array([None if r is None else r - 0.5 for r in rewards], pa.float32()),
    }
    return rollout, pa.table(columns)


def test_answers_are_means_per_problem_in_order():
    found = metrics.answers([rollout_and_grade(["correct", "wrong", "correct", "correct"], [2, 4, 6, 8])])
    assert found.accuracy.tolist() == [0.5, 1.0]
    assert found.length.tolist() == [3.0, 7.0]
    assert found.verdicts == {"correct": 3, "wrong": 1}


def test_a_timeout_is_counted_and_leaves_the_mean():
    found = metrics.answers([rollout_and_grade(["correct", "timeout", "timeout", "timeout"], [2, 4, 6, 8], rejected={1, 2, 3})])
    assert found.accuracy[0] == 1.0
    assert np.isnan(found.accuracy[1])
    assert (found.verdicts, found.rejected) == ({"correct": 1, "timeout": 3}, 3)


def test_policies_pair_by_problem_also_where_one_failed():
    before = metrics.answers([rollout_and_grade(["correct", "wrong", "wrong"], [1, 1, 1], group=1, rejected={0})])
    after = metrics.answers([rollout_and_grade(["correct", "correct", "wrong"], [1, 1, 1], group=1)])
    assert metrics.bootstrap(after.accuracy - before.accuracy).value == 0.5


def test_a_round_without_signal_shows_it():
    _, grade = rollout_and_grade(["wrong"] * 4, [3] * 4)
    grade = grade.set_column(3, "advantage", pa.array([0.0] * 4, pa.float32()))
    found = metrics.round_summary([grade], [np.array([3, 3, 3, 3])], 2)
    assert (found["num_correct"], found["num_wrong"], found["num_groups_without_signal"], found["num_groups"]) == (0, 4, 2, 2)
    assert (found["accuracy"], found["mean_length"], found["num_positive_advantage"]) == (0.0, 3.0, 0.0)


def test_a_round_of_rejected_rows_has_no_nan():
    _, grade = rollout_and_grade(["timeout"] * 2, [3] * 2, rejected={0, 1})
    found = metrics.round_summary([grade], [np.zeros(0, int)], 2)
    assert all(np.isfinite(value) for value in found.values())
    assert (found["num_rejected"], found["num_timeout"]) == (2, 2)


def test_regime_shares_weigh_rows_by_their_tokens():
    shares = {f"share_{n}": [v, v] for n, v in zip(("lock", "mid", "pivot", "fork"), (1.0, 0.0, 0.0, 0.0), strict=True)}
    table = pa.table({**shares, "share_fork": [0.0, 1.0], "share_lock": [1.0, 0.0]})
    found = metrics.regime_summary([table], [np.array([30, 10])])
    assert (found["share_lock"], found["share_fork"]) == (0.75, 0.25)


def test_the_interval_of_a_coin_is_the_known_one():
    values = np.repeat([0.0, 1.0], 200)
    found = metrics.bootstrap(values)
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_an_interval_holds_its_mean(values):
    found = metrics.bootstrap(np.array(values), resamples=200)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9


@pytest.mark.parametrize("values", [[], [1.0], [1.0, np.nan]])
def test_fewer_than_two_problems_have_no_interval(values):
    with pytest.raises(ValueError, match="too few for an interval"):
        metrics.bootstrap(np.array(values))
