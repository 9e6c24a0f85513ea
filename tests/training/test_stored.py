"""A round that is read shard by shard: the same traces, steps and bits as from one table, and little memory."""

from __future__ import annotations

import errno
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from packed_round import shared_round
from training_rounds import make_round, tiny_run

from pipeline.config import Run
from pipeline.contract import TOPK
from pipeline.errors import StoreError, TrainingError
from pipeline.training import batches
from pipeline.training import stored as stored_rounds
from pipeline.training.batches import RoundTable
from pipeline.training.step import Trainer
from pipeline.training.stored import StoredRound, stored
from pipeline.training.student import student

FKL = ("objective.name=fkl", "score.keep_topk=20")


def in_shards(data: RoundTable, folder: Path, sizes: tuple[int, ...] = (5, 4, 3)) -> StoredRound:
    """The round in shards of `sizes` traces."""
    starts = np.cumsum((0, *sizes))
    tables = [data.table.slice(start, size) for start, size in zip(starts, sizes, strict=False)]
    return StoredRound(data.number, data.policy_version, lambda: iter(tables), folder)


@pytest.mark.parametrize("settings", [(), FKL, ("objective.kl=0.1", "score.base_logprobs=true")])
def test_stored_traces_are_those_of_the_table(tmp_path: Path, settings: tuple[str, ...]) -> None:
    run = tiny_run(*settings)
    data = make_round(reject_reason=["cut", *[None] * 5, "cut", *[None] * 5], advantage=[1.0, float("nan"), *[0.5] * 10])
    whole, found = batches.usable(data, 0, run.objective), stored(in_shards(data, tmp_path), 0, run.objective, 64)
    rows = np.array([7, 0, 3])
    assert found.num_rejected == whole.num_rejected == 1
    assert found.ids(rows) == whole.ids(rows)
    assert np.array_equal(found.advantage, whole.advantage)
    assert np.array_equal(found.lengths, whole.lengths)
    columns = {name: getattr(whole, name) for name in ("prompt_tokens", "response_tokens", *batches.SIGNALS)} | dict(whole.extra)
    for name, column in columns.items():
        other = found.extra[name] if name in found.extra else getattr(found, name)
        assert np.array_equal(other.take(rows), column.take(rows)), name
        assert np.array_equal(other.row(4), column.row(4)), name
        assert other.take(rows).dtype == column.take(rows).dtype
    assert not list(tmp_path.iterdir())  # the files have no name, so that nothing is left when a rank is killed


def trained(run: Run, data: RoundTable | StoredRound) -> tuple[list[float], list[torch.Tensor]]:
    made = Trainer(run, student.build(run, torch.device("cpu")), torch.device("cpu"))
    losses = [row["loss"] for row in made.train_round(data)]
    return losses, [p.detach().clone() for p in made.parameters().values()]


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_training_by_shards_has_the_bits_of_training_from_a_table(tmp_path: Path, packing: str) -> None:
    run, data = tiny_run("train.batch_traces=5", f"train.packing={packing}", *FKL), shared_round()
    (losses, weights), (others, again) = trained(run, data), trained(run, in_shards(data, tmp_path))
    assert losses == others
    assert len(losses) == 3
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def test_a_round_without_a_usable_trace_has_no_step(tmp_path: Path) -> None:
    assert trained(tiny_run(), in_shards(make_round(reject_reason=["cut"] * 12), tmp_path))[0] == []


def test_shards_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    run, data = tiny_run(*FKL), make_round()
    kept = [[position[:7] for position in row] if i > 8 else row for i, row in enumerate(data.table[TOPK[0]].to_pylist())]
    place = data.table.schema.get_field_index(TOPK[0])
    cut = data.table.set_column(place, TOPK[0], pa.array(kept, data.table.schema.field(place).type))
    with pytest.raises(TrainingError, match=r"teacher_topk_tokens: positions have \(20,\) and \(7,\)"):
        stored(in_shards(RoundTable(0, 0, cut), tmp_path), 0, run.objective, 64)
    with pytest.raises(TrainingError, match="the model has 9 ids"):
        stored(in_shards(data, tmp_path), 0, run.objective, 9)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stored_rounds._File, "add", full)
    with pytest.raises(StoreError, match=r"cannot write the rows of round 0 .*No space left"):
        stored(in_shards(make_round(), tmp_path), 0, tiny_run().objective, 64)


def test_memory_holds_one_shard_while_reading_and_one_minibatch_while_training(tmp_path: Path) -> None:
    """Of 2 400 traces of 200 tokens a step takes 60. The arrays of a whole round would take 40 times as much."""
    shards, size, tokens, batch = 40, 60, 200, 60
    rng = np.random.default_rng(0)
    ids, floats = pa.list_(pa.int32()), pa.list_(pa.float32())

    def tables():
        for shard in range(shards):
            flat = rng.integers(4, 57, size * tokens).astype(np.int32)
            offsets = np.arange(0, size * tokens + 1, tokens, np.int32)
            columns = {name: pa.ListArray.from_arrays(offsets, flat, ids) for name in ("prompt_tokens", "response_tokens")}
            values = rng.random(size * tokens).astype(np.float32)
            columns |= {name: pa.ListArray.from_arrays(offsets, values, floats) for name in batches.SIGNALS}
            columns |= {"trace_id": pa.array([f"{shard}-{i}" for i in range(size)]), "reject_reason": pa.nulls(size, pa.string())}
            columns |= {"advantage": pa.array(np.ones(size, np.float32)), "policy_version": pa.array(np.zeros(size, np.int32))}
            yield pa.table(columns)

    minibatch = batch * tokens * (2 * 4 + 3 * 4)
    tracemalloc.start()
    try:
        traces = stored(StoredRound(0, 0, tables, tmp_path), 0, tiny_run().objective, 64)
        reading = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        for rows in batches.steps(shards * size, batch, 0, 0):
            for column in (traces.prompt_tokens, traces.response_tokens, traces.teacher_logprobs, traces.student_logprobs):
                column.take(rows)
        training = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    whole = shards * minibatch
    assert reading < whole / 4
    assert training < 2 * minibatch + 100 * shards * size
