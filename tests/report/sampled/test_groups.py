"""Where traces of one group part ways."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.sampled.groups import partings


def test_traces_part_where_the_last_sibling_leaves():
    """All begin with 1; the first two go on with 2, 3 and part at place 3; the third left them at place 1."""
    traces = [np.array(t) for t in ([1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 9])]
    assert partings(traces) == (1, [3, 3, 1])


def test_a_trace_that_a_sibling_repeats_never_parts():
    assert partings([np.array([1, 2]), np.array([1, 2]), np.array([1, 2, 3])]) == (2, [2, 2, 2])


def test_one_trace_has_no_sibling():
    assert partings([np.array([1, 2])]) == (0, [0])


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=2, max_size=6))
@settings(max_examples=200, deadline=None)
def test_it_is_the_longest_equal_beginning_of_any_pair(rows):
    def alike(a, b):
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    common, apart = partings([np.array(row, int) for row in rows])
    pairs = [[alike(a, b) for j, b in enumerate(rows) if i != j] for i, a in enumerate(rows)]
    assert apart == [max(of) for of in pairs]
    assert common == min(min(of) for of in pairs)
