"""Shards to tensors: nothing is lost or doubled, whatever the ranks and budgets; bad rows leave and are counted."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_rounds import make_round

from pipeline.errors import TrainingError
from pipeline.training import batches

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=25).map(np.array)


def test_a_row_lies_as_prompt_response_padding() -> None:
    data = make_round(num_traces=5)
    micro = batches.micro_batch(batches.usable(data, 0), np.array([3, 0]))
    row = data.table.slice(3, 1).to_pylist()[0]
    prompt, response = row["prompt_tokens"], row["response_tokens"]
    width = micro.tokens.shape[1]
    assert micro.tokens[0].tolist() == prompt + response + [0] * (width - len(prompt) - len(response))
    assert micro.targets[: len(response)].tolist() == response
    assert micro.sources[: len(response)].tolist() == list(range(len(prompt) - 1, len(prompt) + len(response) - 1))
    assert micro.teacher_entropy[0][micro.mask[0]].tolist() == row["teacher_entropy"]
    assert micro.mask.sum() == len(micro.targets) == len(micro.sources)
    assert micro.trace_ids == ("r0-3", "r0-0")


@settings(max_examples=40)
@given(st.integers(0, 70), st.integers(1, 20), st.integers(0, 5))
def test_a_round_visits_every_trace_once_in_even_steps(num_traces: int, batch: int, number: int) -> None:
    parts = batches.steps(num_traces, batch, 7, number)
    assert sorted(chain(*parts)) == list(range(num_traces))
    assert len(parts) == -(-num_traces // batch)
    assert not parts or max(map(len, parts)) - min(map(len, parts)) <= 1
    again = batches.steps(num_traces, batch, 7, number)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_rounds_are_shuffled_differently() -> None:
    assert not np.array_equal(batches.steps(50, 50, 0, 1)[0], batches.steps(50, 50, 0, 2)[0])


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 6))
def test_dealing_keeps_every_row_and_balances_tokens(lengths: np.ndarray, ranks: int) -> None:
    rows = np.arange(len(lengths)) + 100
    parts = batches.deal(lengths, ranks, rows)
    assert sorted(chain(*parts)) == rows.tolist()
    tokens = [lengths[part - 100].sum() for part in parts]
    assert max(tokens) - min(tokens) <= lengths.max()


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 300))
def test_micro_batches_stay_within_the_budget(lengths: np.ndarray, budget: int) -> None:
    groups = batches.pack(lengths, budget)
    assert sorted(chain(*groups)) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or lengths[group].max() * len(group) <= budget


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_a_minibatch_in_equally_many_micro_batches(ranks: int) -> None:
    traces = batches.usable(make_round(num_traces=5), 0)
    rows = np.arange(5)
    shares = [batches.share(traces, rows, rank, ranks, 60) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(chain(*(micro.trace_ids for share in shares for micro in share))) == sorted(traces.trace_ids)


@pytest.mark.parametrize("column", ["teacher_logprobs", "student_logprobs", "teacher_entropy", "advantage"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_left_out_and_counted(column: str, value: float) -> None:
    good = make_round().table[column].to_pylist()
    bad = [[*good[0][:-1], value] if isinstance(good[0], list) else value, *good[1:]]
    traces = batches.usable(make_round(**{column: bad}), 0)
    assert traces.num_rejected == 1
    assert traces.trace_ids.tolist() == [f"r0-{i}" for i in range(1, 12)]


def test_rejected_rows_are_passed_by() -> None:
    data = make_round(
        reject_reason=["engine_error", *[None] * 11],
        student_logprobs=[None, *make_round().table["student_logprobs"].to_pylist()[1:]],
    )
    traces = batches.usable(data, 0)
    assert len(traces.trace_ids) == 11
    assert traces.num_rejected == 0


def test_stale_traces_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"round 3, trace r3-2: .*policy \[2\].*max_staleness 0"):
        batches.usable(make_round(3, policy_version=[3, 3, 2, *[3] * 9]), 0)
    assert len(batches.usable(make_round(3, policy_version=[3, 3, 2, *[3] * 9]), 1).trace_ids) == 12


def test_signals_of_another_length_are_refused() -> None:
    entropy = make_round().table["teacher_entropy"].to_pylist()
    entropy[4] = entropy[4] + [1.0]
    with pytest.raises(TrainingError, match=r"r0-4: teacher_entropy has \d+ values for \d+ tokens"):
        batches.usable(make_round(teacher_entropy=entropy), 0)
