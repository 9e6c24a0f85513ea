"""Metrics of a round: what is counted, and what weighs by its tokens."""

import numpy as np
import pyarrow as pa
import pytest

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


def test_a_round_without_signal_shows_it():
    _, grade = rollout_and_grade(["wrong"] * 4, [3] * 4)
    grade = grade.set_column(3, "advantage", pa.array([0.0] * 4, pa.float32()))
    found = metrics.round_summary([grade], [np.array([3, 3, 3, 3])], 2)
    assert (found["num_correct"], found["num_wrong"], found["num_groups_without_signal"], found["num_groups"]) == (0, 4, 2, 2)
    assert (found["accuracy"], found["mean_length"], found["num_positive_advantage"]) == (0.0, 3.0, 0.0)


@pytest.mark.parametrize(("advantage", "said"), [(0.0, "no signal. "), (-0.5, "all is pushed down. ")])
def test_a_round_without_a_right_answer_says_what_it_teaches(advantage, said):
    """A running baseline gives every wrong trace -.5: its round had "no signal", and lowered the chance of all tokens."""
    _, grade = rollout_and_grade(["truncated"] * 4, [3] * 4)
    grade = grade.set_column(3, "advantage", pa.array([advantage] * 4, pa.float32()))
    found = metrics.round_summary([grade], [np.array([3, 3, 3, 3])], 1)
    assert metrics.warning(found).startswith(said + "None of 4 traces was correct (4 truncated, 0 unparsable): ")
    assert metrics.warning(found, scales_advantage=False) is None


def test_a_round_of_rejected_rows_has_no_nan():
    _, grade = rollout_and_grade(["timeout"] * 2, [3] * 2, rejected={0, 1})
    found = metrics.round_summary([grade], [np.zeros(0, int)], 2)
    assert all(np.isfinite(value) for value in found.values())
    assert (found["num_rejected"], found["num_timeout"]) == (2, 2)


def test_a_row_whose_reward_failed_is_no_right_answer():
    """Eight right answers of which four had no reward: accuracy was 8 / 4."""
    _, grade = rollout_and_grade(["correct"] * 8, [3] * 8, group=4, rejected={0, 1, 2, 3})
    found = metrics.round_summary([grade], [np.full(8, 3)], 4)
    assert (found["accuracy"], found["num_correct"], found["num_rejected"]) == (1.0, 4.0, 4.0)


def test_regime_shares_weigh_rows_by_their_tokens():
    shares = {f"share_{n}": [v, v] for n, v in zip(("lock", "mid", "pivot", "fork"), (1.0, 0.0, 0.0, 0.0), strict=True)}
    table = pa.table({**shares, "share_fork": [0.0, 1.0], "share_lock": [1.0, 0.0]})
    found = metrics.regime_summary([table], [np.array([30, 10])])
    assert (found["share_lock"], found["share_fork"]) == (0.75, 0.25)


def test_rounds_whose_engine_was_not_compared_are_counted():
    """A round whose policy is gone trains without a comparison, and the summary once did not say so."""
    step = {"tokens_per_s": 9.0, "tokens": 10}
    rows = [{"round": 0, **step, "logprob_gap": 0.02, "logprob_gap_max": 0.1}, {"round": 0, **step}, {"round": 1, **step}]
    assert metrics.agreement(rows[:2]) == "0.02 nat on average, 0.1 at most, over 1 steps"
    assert metrics.agreement(rows) == "0.02 nat on average, 0.1 at most, over 1 steps; not compared in 1 of 2 rounds"
    assert metrics.agreement(rows[2:]) == "not compared in 1 rounds"
    assert metrics.agreement([{"round": 0, "seconds_round": 1.0}]) is None
