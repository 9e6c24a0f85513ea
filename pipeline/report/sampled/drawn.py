"""Which groups a page shows: even over strata, in whole groups, within limits, the same for the same run.

A group is a problem with all its traces. A stratum is a round and the verdicts that stand in the group, so rare verdicts are
there. Groups are drawn in the order of trace ids, which are hashes. So no seed is stored.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.report.figures import LabelledTraces


class Limits(NamedTuple):
    """How much of the runs one page holds.

    tokens: of all responses. prompts: tokens of all prompts together, of students and teachers. text: bytes of all texts, and as
    many again of what policies answered to held-out problems.
    alternatives: kept tokens of the teacher. A token takes at most 32 bytes of the page, a prompt's token 6, an alternative 9,
    and a byte of text 1.4. So a page has at most MOST_PAGE bytes.
    """

    traces: int = 10_000
    tokens: int = 600_000
    prompts: int = 400_000
    text: int = 4_000_000
    alternatives: int = 400_000

    def shared(self, runs: int) -> Limits:
        """What each of several runs on one page may take."""
        return Limits(*(limit // runs for limit in self))


MOST_PAGE = 40_000_000  # bytes of one page, unless its first trace alone takes more


def choose(strata: np.ndarray, keys: np.ndarray, traces: np.ndarray, tokens: np.ndarray, limits: Limits) -> np.ndarray:
    """Groups of a sample, int64 [S], ascending: from each stratum in turn the group with the least key, while both limits hold.

    strata [R] of any type, keys [R] unique, traces and tokens [R] of each group. A group that exceeds what is left of a limit is
    left out, except the first one.
    """
    if not len(keys):
        return np.zeros(0, np.int64)
    codes = np.unique(strata, return_inverse=True)[1]
    by_key = np.lexsort((keys, codes))
    counts = np.bincount(codes)
    rank = np.empty(len(keys), np.int64)
    rank[by_key] = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    taken: list[int] = []
    left = np.array([limits.traces, limits.tokens])
    for row in np.lexsort((keys, rank)).tolist():
        cost = np.array([traces[row], tokens[row]])
        if (cost <= left).all() or not taken:
            taken.append(row)
            left -= cost
    return np.sort(np.array(taken))


class Groups(NamedTuple):
    """The groups of all rounds: of [R] traces the number of each one's group, and of [N] groups stratum, key, traces, tokens."""

    of: np.ndarray
    strata: np.ndarray
    keys: np.ndarray
    traces: np.ndarray
    tokens: np.ndarray


def groups_of(measured: list[LabelledTraces], most: int) -> Groups:
    """Groups of labelled traces. The traces of a group of more than a quarter of `most` tokens stand alone, one by one."""
    owner = np.repeat(np.arange(len(measured)), [len(rows.trace_ids) for rows in measured])
    ids, shards, verdicts = (
        np.concatenate([getattr(rows, name) for rows in measured]).astype(str) for name in ("trace_ids", "shards", "verdicts")
    )
    prompts, lengths = (np.concatenate([getattr(rows, name) for rows in measured]) for name in ("prompts", "lengths"))
    names = np.char.add(np.char.add(owner.astype(str), np.char.add("/", shards)), np.char.add("/", prompts.astype(str)))
    of = np.unique(names, return_inverse=True)[1].ravel()
    large = np.bincount(of, lengths)[of] > most / 4 if len(of) else of.astype(bool)
    of = np.unique(np.where(large, np.char.add("alone ", ids), names), return_inverse=True)[1].ravel()
    order = np.lexsort((ids, of))
    starts = np.flatnonzero(np.diff(of[order], prepend=-1))
    said = [sorted(set(part.tolist())) for part in np.split(verdicts[order], starts[1:])] if len(of) else []
    strata = [f"{number} {' '.join(part)}" for number, part in zip(owner[order][starts].tolist(), said, strict=True)]
    counts = np.bincount(of), np.bincount(of, lengths).astype(np.int64)
    return Groups(of, np.array(strata, str), ids[order][starts], *counts)
