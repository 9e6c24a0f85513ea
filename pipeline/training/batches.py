"""Shards to tensors: a round's usable traces, its steps, the share of a rank, micro-batches under a token budget.

    RoundTable -> usable() -> Traces -> steps() -> rows of a step -> share() -> MicroBatch, MicroBatch, ...

Everything is a function of the table, the seed, the round number and the number of ranks. A resumed round is therefore dealt
exactly as the first time, and all ranks together always compute the same minibatch. ../method/README.md lists the traps that are
named by number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.contract import TOPK
from pipeline.errors import TrainingError
from pipeline.training.packing import layout
from pipeline.training.packing.attention import Layout

if TYPE_CHECKING:
    from pipeline.config import Objective

SILENT = 1e9  # tokens times weights of a layer: below it, a pass more for silent traces costs what it saves
SIGNALS = ("teacher_logprobs", "student_logprobs", "teacher_entropy")


@dataclass(frozen=True)
class RoundTable:
    """A round as the trainer gets it. `table` has one row per trace, and the student log-probs are those of `policy_version`.

    comparable: whether this run still has the policy that answered. It has not where earlier rounds were trained again since.
    answered: the weights of that policy, by the names of the trained ones, where the trainer's own are newer.
    """

    number: int
    policy_version: int
    table: pa.Table
    comparable: bool = True
    answered: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class RaggedColumn:
    """Rows of unequal length from a list column. Row i is `values[starts[i] : starts[i] + lengths[i]]`.

    `values` is [M], or [M, K] for a column of K values per token.
    """

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> RaggedColumn:
        """From an Arrow list column. A null inside a float row becomes NaN, a null row becomes an empty row."""
        lists = column.combine_chunks()
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        flat = lists.flatten()
        values = _rectangle(flat) if pa.types.is_list(flat.type) else flat.to_numpy(zero_copy_only=False)
        return cls(values, np.cumsum(lengths) - lengths, lengths)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Values of `rows` [B], one row after the other -> [N] or [N, K], where N is the sum of their lengths."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return self.values[np.repeat(self.starts[rows], lengths) + within]

    def row(self, row: int) -> np.ndarray:
        """The values of one row."""
        return self.values[self.starts[row] : self.starts[row] + self.lengths[row]]


class Column(Protocol):
    """What `RaggedColumn` and `stored.StoredColumn` have in common: the first is in memory, the second in a file."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, [N]."""

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Values of `rows` [B], one row after the other -> [N] or [N, K], where N is the sum of their lengths."""

    def row(self, row: int) -> np.ndarray:
        """The values of one row."""


@dataclass(frozen=True, eq=False)
class Traces:
    """The N usable traces of a round. Signals are ragged float32 in nats, with one value per response token; advantage is [N].

    `num_rejected` counts the traces that no stage rejected but that are empty or not finite. They leave the loss and its
    denominator. In the control `student_entropy`, `teacher_entropy` holds the student's entropy. `extra` has the columns that
    only some objectives read, by name.
    """

    number: int
    trace_ids: np.ndarray | pa.Array
    prompt_tokens: Column
    response_tokens: Column
    teacher_logprobs: Column
    student_logprobs: Column
    teacher_entropy: Column
    advantage: np.ndarray
    num_rejected: int
    extra: Mapping[str, Column] = field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of prompt and response of every trace, [N]."""
        return self.prompt_tokens.lengths + self.response_tokens.lengths

    def ids(self, rows: np.ndarray) -> tuple[str, ...]:
        """The ids of `rows`."""
        ids = self.trace_ids
        return tuple(ids.take(pa.array(rows)).to_pylist() if isinstance(ids, pa.Array) else ids[rows])


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward pass: B traces, L tokens wide, T response tokens wide, N response tokens in all.

    It is padded or packed. In a padded one a row of `tokens` [B, L] is [prompt | response | padding] without a gap. Under causal
    attention no token before the padding sees it, and positions count from 0. So the forward pass needs no attention mask and no
    position ids, and fast causal kernels apply. Padding on the left would need both. Padding between prompt and response would
    predict the first response token from a pad position (trap 6). A packed one has a `layout`, and its `tokens` [1, L] are one
    stream (attention.py).

    `sources` [N] are flat positions in `tokens`: the hidden state there predicts a response token. `targets` [N] are those
    tokens, in the row-major order of `mask` [B, T]. Signals [B, T] in nats are 0 outside the mask; advantage [B]. `extra` has
    columns that only some objectives read: [B, T] like the signals. The teacher's most likely tokens are [N, K], like targets.
    `num_tokens` counts the tokens of the pass without padding, and `num_shared` those that a prompt saved. `is_silent`: nothing
    is learned from these traces, so they take no backward pass.
    """

    tokens: Tensor
    sources: Tensor
    targets: Tensor
    mask: Tensor
    teacher_logprobs: Tensor
    student_logprobs: Tensor
    teacher_entropy: Tensor
    advantage: Tensor
    trace_ids: tuple[str, ...]
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    layout: Layout | None = None
    num_tokens: int = 0
    num_shared: int = 0
    is_silent: bool = False

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on `device`."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {n: v.to(device, non_blocking=True) for n, v in values.items() if isinstance(v, Tensor)}
        moved["extra"] = {name: tensor.to(device, non_blocking=True) for name, tensor in self.extra.items()}
        return replace(self, layout=self.layout and self.layout.to(device), **moved)


def usable(data: RoundTable, max_staleness: int, constants: Objective | None = None) -> Traces:
    """The traces of a round that may be trained on: not rejected, not empty, and finite.

    `constants` is the objective, whose further columns are read. Traces of writers that it may not learn from are left out. With
    entropy = "student" the student's own entropy takes the teacher's place. Raises TrainingError when a policy older than
    `max_staleness` rounds wrote a trace, or when signals of a trace differ in length. Raises it too when a column is not there.
    """
    table = data.table.filter(pc.is_null(data.table["reject_reason"]))
    if constants is not None and "trace_source" in table.column_names:
        table = table.filter(pc.is_in(table["trace_source"], pa.array(constants.sources)))
    if constants is not None and constants.entropy == "student":
        place = table.schema.get_field_index("teacher_entropy")
        table = table.set_column(place, "teacher_entropy", table["rollout_entropy"])
    _check_fresh(data.number, table, max_staleness)
    names = () if constants is None else constants.columns
    _check_columns(data.number, table, names)
    ragged = {name: RaggedColumn.of(table[name]) for name in ("prompt_tokens", "response_tokens", *SIGNALS, *names)}
    _check_lengths(data.number, table, ragged)
    advantage = table["advantage"].to_numpy().astype(np.float32)
    fit = np.isfinite(advantage) & (ragged["prompt_tokens"].lengths > 0) & (ragged["response_tokens"].lengths > 0)
    for name in (*SIGNALS, *names):
        signal = ragged[name]
        finite = np.isfinite(signal.values)
        fit[np.repeat(np.arange(len(fit)), signal.lengths)[~(finite.all(1) if finite.ndim == 2 else finite)]] = False
    kept = {name: RaggedColumn(r.values, r.starts[fit], r.lengths[fit]) for name, r in ragged.items()}
    ids = table["trace_id"].to_numpy()[fit]
    extra = {name: kept.pop(name) for name in names}
    return Traces(data.number, ids, advantage=advantage[fit], num_rejected=int((~fit).sum()), extra=extra, **kept)


def check_ids(traces: Traces, vocab_size: int) -> None:
    """Raise TrainingError, with the trace, for an id of prompt, response or teacher that is outside the model's vocabulary."""
    columns: dict[str, Column] = {name: getattr(traces, name) for name in ("prompt_tokens", "response_tokens")}
    columns |= {name: column for name, column in traces.extra.items() if name == TOPK[0]}
    for name, column in columns.items():
        for row in range(len(column.lengths)):
            ids = column.row(row)
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise TrainingError(
                    f"{name} has id {ids.max() if ids.max() >= vocab_size else ids.min()}, and the model has {vocab_size} ids",
                    f"round {traces.number}, trace {traces.trace_ids[row]}",
                    f"Another model wrote the trace, or its shard is damaged: redo {_writer(name)} of round {traces.number}",
                )


def _writer(column: str) -> str:
    return "score" if column in TOPK else "rollout"


def steps(num_traces: int, batch_traces: int, seed: int, number: int) -> list[np.ndarray]:
    """Rows of every optimiser step of round `number`: ceil(N / batch_traces) even parts of a shuffle seeded by (seed, round)."""
    if num_traces == 0:
        return []
    order = np.random.default_rng([seed, number]).permutation(num_traces)
    return np.array_split(order, -(-num_traces // batch_traces))


def silent(traces: Traces, rows: np.ndarray, constants: Objective, weights: float) -> np.ndarray:
    """Which `rows` of a minibatch teach nothing, bool [B]: those without an advantage, where an objective needs one.

    weights: of one layer of the model. All are False where a backward pass for these traces costs less than SILENT.
    """
    found = np.full(len(rows), constants.needs_advantage) & (traces.advantage[rows] == 0)
    return found if weights * traces.lengths[rows[found]].sum() >= SILENT else np.zeros_like(found)


def share(traces: Traces, rows: np.ndarray, rank: int, ranks: int, budget: int, packed: bool = False) -> list[MicroBatch]:
    """The part of the minibatch `rows` that `rank` of `ranks` computes, in micro-batches of at most `budget` tokens.

    Padding counts. Every rank gets the same number of micro-batches, because FSDP gathers parameters in each. A rank with fewer
    traces gets idle micro-batches, of one token without a response.
    """
    if packed:
        streams = layout.dealt(traces, rows, ranks, budget)
        most, batches = max(map(len, streams)), [packed_batch(traces, parts) for parts in streams[rank]]
    else:
        dealt = deal(traces.lengths[rows], ranks, rows)
        groups = [pack(traces.lengths[part], budget) for part in dealt]
        most, batches = max(map(len, groups)), [micro_batch(traces, dealt[rank][chosen]) for chosen in groups[rank]]
    return batches + [_idle(traces)] * (most - len(batches))


def deal(lengths: np.ndarray, ranks: int, rows: np.ndarray) -> list[np.ndarray]:
    """Deal `rows` to ranks so that tokens balance: longest first, to ranks in turn and back again (0 1 1 0 0 1 ...)."""
    order = np.argsort(-lengths, kind="stable")
    turn, seat = np.divmod(np.arange(len(rows)), ranks)
    owner = np.where(turn % 2 == 0, seat, ranks - 1 - seat)
    return [rows[order[owner == rank]] for rank in range(ranks)]


def pack(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Split traces, sorted longest first, into groups whose padded size stays within `budget` tokens.

    A trace that is longer than the budget gets a group of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    groups, start = [], 0
    while start < len(order):
        size = max(1, budget // int(lengths[order[start]]))
        groups.append(order[start : start + size])
        start += size
    return groups


def micro_batch(traces: Traces, rows: np.ndarray) -> MicroBatch:
    """The padded tensors of `rows`. See MicroBatch for the layout and why it needs no mask."""
    prompts, responses = traces.prompt_tokens.lengths[rows], traces.response_tokens.lengths[rows]
    columns = np.arange(int((prompts + responses).max()))[None]
    tokens = np.zeros((len(rows), columns.size), np.int64)
    in_response = (columns >= prompts[:, None]) & (columns < (prompts + responses)[:, None])
    tokens[columns < prompts[:, None]] = traces.prompt_tokens.take(rows)
    tokens[in_response] = traces.response_tokens.take(rows)
    sources = np.flatnonzero(in_response) - 1  # the position before a token predicts it
    return _batch(traces, rows, tokens, sources, num_tokens=int((prompts + responses).sum()))


def packed_batch(traces: Traces, parts: list[np.ndarray]) -> MicroBatch:
    """The stream of pieces of traces, each of one prompt (layout.py)."""
    rows, tokens, sources, packed = layout.stream(traces, parts)
    saved = int(traces.lengths[rows].sum()) - len(tokens)
    return _batch(traces, rows, tokens[None], sources, layout=packed, num_tokens=len(tokens), num_shared=saved)


def _batch(traces: Traces, rows: np.ndarray, tokens: np.ndarray, sources: np.ndarray, **more: Any) -> MicroBatch:
    """The micro-batch of `rows`, with their signals. `more` are further fields of it."""
    responses = traces.response_tokens.lengths[rows]
    mask = np.arange(int(responses.max()))[None] < responses[:, None]
    signals: dict[str, Any] = {name: _padded(getattr(traces, name).take(rows), mask) for name in SIGNALS}
    return MicroBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(sources),
        torch.from_numpy(traces.response_tokens.take(rows).astype(np.int64)),
        torch.from_numpy(mask),
        advantage=torch.from_numpy(traces.advantage[rows]),
        trace_ids=traces.ids(rows),
        extra={name: _extra(name, column.take(rows), mask) for name, column in traces.extra.items()},
        **signals,
        **more,
    )


def _extra(name: str, flat: np.ndarray, mask: np.ndarray) -> Tensor:
    """A column [N] as [B, T]. The teacher's most likely tokens [N, K] stay without padding, ids as int64."""
    if name not in TOPK:
        return _padded(flat, mask)
    return torch.from_numpy(flat.astype(np.int64 if name == TOPK[0] else np.float32))


def trace_seeds(micro: MicroBatch, seed: int) -> Tensor:
    """A seed for every trace, int64 [B]. The trace's id and the run's seed decide it; place, batch and rank do not."""
    digests = [hashlib.sha256(f"{seed}/{trace}".encode()).digest()[:7] for trace in micro.trace_ids]
    seeds = [int.from_bytes(digest, "big") for digest in digests]
    return torch.tensor(seeds or [0], dtype=torch.int64, device=micro.mask.device)  # an idle micro-batch has a row, but no trace


def _padded(flat: np.ndarray, mask: np.ndarray) -> Tensor:
    padded = np.zeros(mask.shape, np.float32)
    padded[mask] = flat
    return torch.from_numpy(padded)


def _idle(traces: Traces) -> MicroBatch:
    none, zero = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 1)
    mask, rows = zero.bool().numpy(), np.zeros(0, np.int64)
    extra = {name: _extra(name, column.take(rows), mask) for name, column in traces.extra.items()}
    return MicroBatch(zero.long(), none, none, zero.bool(), zero, zero, zero, torch.zeros(1), (), extra)


def _rectangle(lists: pa.ListArray) -> np.ndarray:
    """Lists of K values each as [M, K]. Raises TrainingError when they differ in length."""
    sizes = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    if len(sizes) and sizes.min() != sizes.max():
        what = f"positions have {sizes.min()} to {sizes.max()} of the teacher's most likely tokens"
        raise TrainingError(what, TOPK[0], "Redo the score stage of this round")
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(sizes), -1) if len(sizes) else values.reshape(0, 0)


def _check_columns(number: int, table: pa.Table, names: tuple[str, ...]) -> None:
    """Raise TrainingError, with the stage to redo, when a column that the objective reads is not there."""
    if missing := [name for name in names if name not in table.column_names]:
        raise TrainingError(f"there is no column {missing[0]}, which the objective reads", f"round {number}", remedy(missing[0]))


def remedy(column: str) -> str:
    """What brings a column that a setting leaves out."""
    setting = {"base_logprobs": "score.base_logprobs=true"}.get(column, "score.keep_topk=16")
    return f"Run `egrsd stage score --set {setting}` for every round; no trace is written again"


def _check_fresh(number: int, table: pa.Table, max_staleness: int) -> None:
    stale = table.filter(pc.less(table["policy_version"], number - max_staleness))
    if stale.num_rows:
        versions = sorted(set(stale["policy_version"].to_pylist()))
        raise TrainingError(
            f"{stale.num_rows} traces were written by policy {versions}, older than max_staleness {max_staleness} allows",
            f"round {number}, trace {stale['trace_id'][0].as_py()}",
            f"Redo rollout of round {number} with policy {number}",
        )


def _check_lengths(number: int, table: pa.Table, ragged: dict[str, RaggedColumn]) -> None:
    for name in ragged.keys() - {"prompt_tokens", "response_tokens"}:
        wrong = np.flatnonzero(ragged[name].lengths != ragged["response_tokens"].lengths)
        if len(wrong):
            raise TrainingError(
                f"{name} has {ragged[name].lengths[wrong[0]]} values for {ragged['response_tokens'].lengths[wrong[0]]} tokens",
                f"round {number}, trace {table['trace_id'][int(wrong[0])].as_py()}",
                "Redo the score stage of this round",
            )
