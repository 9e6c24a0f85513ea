"""Packed micro-batches: which traces share a prompt, what a rank computes of a minibatch, and the layout of every stream.

    rows of a step -> pieces (a prompt and some of its traces) -> ranks -> micro-batches under a token budget -> Layout

A padded micro-batch computes the prompt of a group once for every trace, and its padding. A packed one computes each prompt once
and has no padding. attention.py says how attention sees a stream. Everything is a function of rows, lengths and prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.training.packing.attention import Block, Layout, Part

if TYPE_CHECKING:
    from pipeline.training.batches import Traces

SQUARE = 1.25  # cells of a block for each of its tokens, at most
FEW = 512  # a block of so few cells may have more: one call is then cheaper than two
PAYS = 0.05  # share of a padded pass that must be padding or repeated prompts
CALL = 16e6  # weights of a layer in which a token costs what a call of attention does, with all that cuts and joins for it


def pays(traces: Traces, rows: np.ndarray, padded: list[np.ndarray], limit: int, weights: float) -> bool:
    """Whether packing pays for a minibatch whose padded passes would be `padded`, by places in `rows`.

    limit: tokens of a piece, at most (`most`). weights: of one layer of the model. Packing saves tokens, and takes more calls of
    attention: one for each prompt and block, where a padded pass takes one. It pays where it saves PAYS of the padded passes, and
    more tokens than its calls cost.
    """
    lengths = traces.lengths[rows]
    area = sum(len(group) * int(lengths[group].max()) for group in padded)
    parts = pieces(traces, rows, limit)
    saved = area - sum(cost(traces, part) for part in parts)
    shared = [part for part in parts if len(part) > 1]
    alone = np.sort(traces.lengths[[part[0] for part in parts if len(part) == 1]])[::-1]
    calls = sum(1 + len(blocks(traces.response_tokens.lengths[part])) for part in shared) + len(blocks(alone))
    return saved >= max(PAYS * area, (calls - len(padded)) * CALL / weights)


def cost(traces: Traces, rows: np.ndarray) -> int:
    """Tokens that a pass takes for traces of one prompt."""
    return int(traces.prompt_tokens.lengths[rows[0]] + traces.response_tokens.lengths[rows].sum())


def pieces(traces: Traces, rows: np.ndarray, limit: int) -> list[np.ndarray]:
    """The rows of a minibatch by prompt, longest responses first, in pieces of at most `limit` tokens.

    A trace that is longer than the limit is a piece of its own. Prompts are the same where their tokens are.
    """
    groups: dict[bytes, list[int]] = {}
    for row in rows.tolist():
        groups.setdefault(traces.prompt_tokens.row(row).tobytes(), []).append(row)
    found = []
    for group in groups.values():
        members = np.array(group)
        members = members[np.argsort(-traces.response_tokens.lengths[members], kind="stable")]
        start, total = 0, int(traces.prompt_tokens.lengths[group[0]])
        for place, length in enumerate(traces.response_tokens.lengths[members].tolist()):
            if place > start and total + length > limit:
                found.append(members[start:place])
                start, total = place, int(traces.prompt_tokens.lengths[group[0]])
            total += length
        found.append(members[start:])
    return found


def most(traces: Traces, rows: np.ndarray, ranks: int, budget: int) -> int:
    """Tokens of a piece, at most: the budget, and the share of one rank in a minibatch."""
    whole = sum(cost(traces, piece) for piece in pieces(traces, rows, traces.lengths[rows].sum()))
    return min(budget, -(-whole // ranks))


def dealt(traces: Traces, rows: np.ndarray, ranks: int, budget: int) -> list[list[list[np.ndarray]]]:
    """The micro-batches of every rank, each a list of pieces: the dearest piece first, to the rank with the fewest tokens.

    A piece has at most `budget` tokens, and at most the share of one rank, as far as that is possible.
    """
    parts = pieces(traces, rows, most(traces, rows, ranks, budget))
    costs = np.array([cost(traces, part) for part in parts])
    mine: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for index in np.argsort(-costs, kind="stable").tolist():
        least = load.index(min(load))
        mine[least].append(index)
        load[least] += int(costs[index])
    return [[[parts[i] for i in bin_] for bin_ in filled(costs, chosen, budget)] for chosen in mine]


def filled(costs: np.ndarray, chosen: Sequence[int], budget: int) -> list[list[int]]:
    """Pieces, dearest first, in as few micro-batches of at most `budget` tokens as first fit finds."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in chosen:
        size = int(costs[index])
        place = next((i for i, left in enumerate(room) if left >= size), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(budget)
        bins[place].append(index)
        room[place] -= size
    return bins


def stream(traces: Traces, parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, Layout]:
    """The stream of one micro-batch: its rows in order, tokens [L], sources [N], layout.

    Pieces of several traces come first, each with its prompt. Traces that are alone with their prompt follow as a part without a
    prompt, longest first. `sources` has the place before every response token, which predicts it, row after row.
    """
    shared = [part for part in parts if len(part) > 1]
    alone = np.array([part[0] for part in parts if len(part) == 1], np.int64)
    alone = alone[np.argsort(-traces.lengths[alone], kind="stable")]
    tokens, positions, sources, laid = [], [], [], []
    at = 0
    for part in shared:
        prompt, lengths = traces.prompt_tokens.row(int(part[0])), traces.response_tokens.lengths[part]
        starts = at + len(prompt) + np.cumsum(lengths) - lengths
        tokens += [prompt, traces.response_tokens.take(part)]
        positions += [np.arange(len(prompt)), len(prompt) + _within(lengths)]
        before = np.repeat(starts - 1, lengths) + _within(lengths)
        before[np.cumsum(lengths) - lengths] = at + len(prompt) - 1  # the end of the prompt predicts every first token
        sources.append(before)
        laid.append(Part(len(prompt), blocks(lengths)))
        at += len(prompt) + int(lengths.sum())
    if len(alone):
        lengths, prompts = traces.lengths[alone], traces.prompt_tokens.lengths[alone]
        inside = _within(lengths)
        whole = np.empty(int(lengths.sum()), np.int64)
        is_prompt = inside < np.repeat(prompts, lengths)
        whole[is_prompt], whole[~is_prompt] = traces.prompt_tokens.take(alone), traces.response_tokens.take(alone)
        tokens.append(whole)
        positions.append(inside)
        sources.append(at + np.flatnonzero(~is_prompt) - 1)
        laid.append(Part(0, blocks(lengths)))
    rows = np.concatenate([*shared, alone])
    layout = Layout(torch.from_numpy(np.concatenate(positions))[None], tuple(laid))
    return rows, np.concatenate(tokens).astype(np.int64), np.concatenate(sources), layout


def blocks(lengths: np.ndarray) -> tuple[Block, ...]:
    """Traces of `lengths`, longest first, in blocks that have little padding."""
    found, start = [], 0
    for end in range(1, len(lengths) + 1):
        cells = int(lengths[start]) * (end + 1 - start)
        if end == len(lengths) or cells > max(FEW, SQUARE * lengths[start : end + 1].sum()):
            found.append(_block(lengths[start:end]))
            start = end
    return tuple(found)


def _block(lengths: np.ndarray) -> Block:
    """The block of traces of `lengths`, of which the first is the longest."""
    width, starts = int(lengths[0]), np.cumsum(lengths) - lengths
    columns = np.arange(width)[None]
    cells = starts[:, None] + np.minimum(columns, lengths[:, None] - 1)
    taken = np.flatnonzero((columns < lengths[:, None]).ravel())
    return Block(width, torch.from_numpy(cells.ravel()), torch.from_numpy(taken))


def _within(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... within each of `lengths`, one after the other."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
