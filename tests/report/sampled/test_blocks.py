"""Blocks are opened as they were packed, and are the same bytes for the same content."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import unpack

from pipeline.report.sampled.blocks import Words, pack


@given(st.lists(st.integers(0, 2**32 - 1)), st.lists(st.floats(-60_000, 60_000, width=16)), st.lists(st.integers(0, 255)))
@settings(max_examples=50, deadline=None)
def test_a_block_is_opened_as_it_was_packed(words, halves, codes):
    sections = [("tokens", "u4", np.array(words, np.int64)), ("gate", "f2", np.array(halves)), ("regime", "u1", np.array(codes))]
    block = pack({"texts": ["né 日本 </script>"]}, sections)
    head, found = unpack(block)
    assert head == {"texts": ["né 日本 </script>"]}
    assert found["tokens"].tolist() == words
    assert found["gate"].tolist() == halves
    assert found["regime"].tolist() == codes
    assert pack({"texts": ["né 日本 </script>"]}, sections) == block


def test_what_a_half_float_cannot_hold_becomes_its_largest():
    assert unpack(pack({}, [("x", "f2", np.array([1e9, -1e9]))]))[1]["x"].tolist() == [65504, -65504]


def test_a_lone_surrogate_does_not_stop_a_page():
    assert unpack(pack({"text": "a\ud800b"}, []))[0]["text"] == "a?b"


def test_a_head_without_a_json_number_is_refused():
    with pytest.raises(ValueError, match="Out of range"):
        pack({"x": float("nan")}, [])


def test_words_are_numbered_as_they_come():
    words = Words()
    assert words.of(np.array([7, 3, 7])).tolist() == [1, 0, 1]  # of one array in the order of ids
    assert words.of(np.array([9, 3])).tolist() == [2, 0]
    assert list(words.numbers) == [3, 7, 9]
