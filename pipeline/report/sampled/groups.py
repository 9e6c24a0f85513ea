"""Where the traces of one group part ways: the token at which a trace leaves its last sibling."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def partings(traces: list[np.ndarray]) -> tuple[int, list[int]]:
    """(common, apart) of G traces, each [T] token ids.

    common: tokens that all traces begin with. apart [G]: for each trace the first token that no sibling has after the same
    beginning. It is the length of the trace when a sibling has the whole of it. With one trace both are 0.
    """
    if len(traces) < 2:
        return 0, [0] * len(traces)
    order = sorted(range(len(traces)), key=lambda row: traces[row].tolist())
    shared = [_shared(traces[one], traces[other]) for one, other in pairwise(order)]
    apart = [0] * len(traces)
    for place, length in enumerate(shared):  # the sibling with the longest equal beginning is a neighbour in this order
        for row in order[place : place + 2]:
            apart[row] = max(apart[row], length)
    return min(shared), apart


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens that two traces begin with alike."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size
