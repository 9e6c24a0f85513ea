"""Which traces are packed together: pieces, ranks, streams and blocks, and when packing pays."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed_round import GROUPS, shared_traces

from pipeline.training import batches
from pipeline.training.packing import layout

ALL = np.arange(sum(GROUPS))


def test_a_stream_has_each_prompt_once_and_no_padding() -> None:
    traces = shared_traces()
    (micro,) = batches.share(traces, ALL, 0, 1, 10_000, packed=True)
    firsts = np.cumsum(GROUPS) - GROUPS
    once = int(traces.prompt_tokens.lengths[firsts].sum() + traces.response_tokens.lengths.sum())
    assert micro.tokens.shape == (1, once)
    assert (micro.num_tokens, micro.num_shared) == (once, int(traces.lengths.sum()) - once)
    assert sum(micro.layout.sizes) == once


@pytest.mark.parametrize("budget", [1, 60, 90, 10_000])
def test_every_response_token_is_predicted_from_the_token_before_it(budget: int) -> None:
    traces = shared_traces()
    place = {name: row for row, name in enumerate(traces.trace_ids)}
    for micro in batches.share(traces, ALL, 0, 1, budget, packed=True):
        tokens, positions = micro.tokens[0].numpy(), micro.layout.positions[0].numpy()
        starts = np.cumsum(micro.mask.sum(1).numpy())[:-1]
        for name, sources, targets in zip(
            micro.trace_ids, np.split(micro.sources, starts), np.split(micro.targets, starts), strict=True
        ):
            prompt, response = traces.prompt_tokens.row(place[name]), traces.response_tokens.row(place[name])
            assert targets.tolist() == response.tolist()
            assert tokens[sources].tolist() == [prompt[-1], *response[:-1]]
            assert positions[sources].tolist() == list(range(len(prompt) - 1, len(prompt) + len(response) - 1))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1, 40, 90, 10_000])
def test_ranks_share_a_packed_minibatch_in_equally_many_micro_batches(ranks: int, budget: int) -> None:
    traces = shared_traces()
    shares = [batches.share(traces, ALL, rank, ranks, budget, packed=True) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(chain(*(micro.trace_ids for share in shares for micro in share))) == sorted(traces.trace_ids)
    for micro in chain(*shares):
        assert micro.tokens.numel() <= budget or len(micro.trace_ids) == 1


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=40))
def test_blocks_hold_every_token_once_and_little_padding(drawn: list[int]) -> None:
    lengths = np.sort(np.array(drawn))[::-1].copy()
    at = 0
    for block in layout.blocks(lengths):
        rows, size = len(block.cells) // block.width, len(block.taken)
        mine = lengths[at : at + rows]
        assert block.width == mine[0]
        assert block.cells[block.taken].tolist() == list(range(size))
        assert size == mine.sum()
        assert len(block.cells) <= max(layout.FEW, layout.SQUARE * size)
        at += rows
    assert at == len(lengths)


TINY, SMOLLM2, LARGE = 2e5, 3.5e6, 1e8  # weights of one layer


@pytest.mark.parametrize(
    ("settings", "weights", "expected"),
    [
        ({"prompt": (10, 12)}, TINY, False),  # the demo: calls cost what it saves
        ({"prompt": (40, 50)}, SMOLLM2, True),  # short traces of a model whose tokens are dear
        ({"prompt": (80, 90)}, SMOLLM2, True),
    ],
)
def test_packing_pays_where_it_saves_more_tokens_than_its_calls_cost(
    settings: dict[str, Any], weights: float, expected: bool
) -> None:
    traces = shared_traces(**settings)
    rows = np.arange(len(traces.advantage))
    assert layout.pays(traces, rows, batches.pack(traces.lengths, 400), 400, weights) == expected


def test_packing_does_not_pay_where_nothing_repeats_and_nothing_is_padded() -> None:
    apart = shared_traces(groups=(1,) * 12)
    assert not layout.pays(apart, np.arange(12), [np.array([row]) for row in range(12)], 10_000, LARGE)


def test_traces_that_are_alone_with_their_prompts_share_their_calls() -> None:
    """Twelve traces of one padded pass are one block or few, so saving their padding pays where twelve calls would not."""
    apart, rows = shared_traces(groups=(1,) * 12), np.arange(12)
    lengths = np.sort(apart.lengths)[::-1].copy()
    saved, calls = int(12 * lengths[0] - lengths.sum()), len(layout.blocks(lengths))
    assert calls < 4
    weights = 1.001 * (calls - 1) * layout.CALL / saved
    assert layout.pays(apart, rows, [rows], 10_000, weights or 1.0)


def test_a_prompt_that_pieces_repeat_saves_nothing() -> None:
    """One prompt of 90 tokens and six responses; a piece of at most 100 tokens has the prompt and hardly a response."""
    traces, rows = shared_traces(groups=(6,), prompt=(90, 91)), np.arange(6)
    padded = [np.array([row]) for row in range(6)]
    assert layout.pays(traces, rows, padded, layout.most(traces, rows, 1, 10_000), LARGE)
    assert not layout.pays(traces, rows, padded, layout.most(traces, rows, 1, 91), LARGE)


def test_packing_pays_by_the_arithmetic_of_tokens_and_calls() -> None:
    """Two prompts of 50 tokens with two responses each: one padded pass of four rows, or 2 prompts + 2 blocks = 4 calls."""
    traces = shared_traces(groups=(2, 2), prompt=(50, 51))
    rows = np.arange(4)
    saved = 4 * int(traces.lengths.max()) - 2 * 50 - int(traces.response_tokens.lengths.sum())
    even = (4 - 1) * layout.CALL / saved  # of a layer with so many weights, `saved` tokens cost what three calls more cost
    assert layout.pays(traces, rows, [rows], 10_000, even * 1.001)
    assert not layout.pays(traces, rows, [rows], 10_000, even * 0.999)


def test_prompts_of_8000_tokens_leave_no_padding() -> None:
    """The aim is at most 5 % on traces of 100 to 8 000 tokens; a stream has none, and its blocks in attention little."""
    lengths = np.sort(np.exp(np.random.default_rng(0).uniform(np.log(100), np.log(8000), 64)).astype(int))[::-1].copy()
    found = layout.blocks(lengths)
    assert sum(len(block.taken) for block in found) == lengths.sum()
    assert sum(len(block.cells) for block in found) <= layout.SQUARE * lengths.sum()
