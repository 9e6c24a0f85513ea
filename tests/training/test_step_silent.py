"""Traces without an advantage take no backward pass where an objective needs one, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from packed_round import GROUPS, shared_round
from steps import engine_logprobs, gradient_of, same, trained, trainer
from training_rounds import make_round, tiny_run

from pipeline.config import Run
from pipeline.errors import TrainingError
from pipeline.training import batches
from pipeline.training.batches import RoundTable

ONE_STEP = ("train.batch_traces=12", "train.micro_batch_tokens=90")
SILENT = [0, 1, 2, 3, 7, 8]  # the first group and two lone traces


def with_silent(data: RoundTable, silent: list[int]) -> RoundTable:
    """A round whose traces in the places `silent` have no advantage."""
    values = [0.0 if i in silent else value for i, value in enumerate(data.table["advantage"].to_pylist())]
    place = data.table.schema.get_field_index("advantage")
    return replace(data, table=data.table.set_column(place, "advantage", pa.array(values, pa.float32())))


def check_same(run: Run, data: RoundTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient and metrics with passes of their own for silent traces are those without."""
    whole, expected = gradient_of(run, data)
    monkeypatch.setattr(batches, "SILENT", 0)
    found, gradient = gradient_of(run, data)
    same(whole, found, 1e-4)
    for name, values in expected.items():
        torch.testing.assert_close(gradient[name], values, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("packing", ["padded", "packed"])
@pytest.mark.parametrize("objective", ["egrsd", "cl_egrsd", "grpo", "rlsd", "position", "opd", "fkl", "reward_opd"])
def test_gradient_and_metrics_are_those_of_all_traces(objective: str, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(*ONE_STEP, f"objective.name={objective}", f"train.packing={packing}", "score.keep_topk=20")
    data = with_silent(shared_round(groups=GROUPS), SILENT)
    check_same(run, data, monkeypatch)


@pytest.mark.parametrize("settings", [("clip=ppo",), ("correction=token",), ("gate=top_entropy:0.4",), ("control=uniform",)])
def test_ratios_and_figures_of_the_whole_minibatch_stay(settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(*ONE_STEP, "objective.name=egrsd", *(f"objective.{text}" for text in settings))
    data = with_silent(make_round(), SILENT)
    check_same(run, data, monkeypatch)


def test_silent_traces_are_read_in_the_compared_step_only_and_never_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SILENT", 0)
    made, passes = trainer(tiny_run()), []
    made.student.register_forward_pre_hook(
        lambda _, args: passes.append((torch.is_grad_enabled(), len(args[1])))  # sources: one for each response token
    )
    data = with_silent(make_round(), SILENT)
    metrics = list(made.train_round(data))
    lengths = np.array([len(tokens) for tokens in data.table["response_tokens"].to_pylist()])
    first, second = batches.steps(12, 6, 3, 0)
    silent = np.isin(np.arange(12), SILENT)
    learned = sum(tokens for backward, tokens in passes if backward)
    read = sum(tokens for backward, tokens in passes if not backward)
    assert learned == lengths[~silent].sum()
    assert read == lengths[first[silent[first]]].sum() > 0
    assert [row["tokens"] for row in metrics] == [lengths[first].sum(), lengths[second].sum()]  # the mean is over all tokens


def test_a_wrong_log_prob_of_a_silent_trace_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SILENT", 0)
    run = tiny_run("train.batch_traces=12", "train.logprob_gap=null", "train.logprob_gap_max=null")
    known = engine_logprobs(trainer(run), make_round())
    wrong = [[*row[:-1], row[-1] - 0.5 * (place == SILENT[0])] for place, row in enumerate(known)]
    with pytest.raises(TrainingError, match=r"by 0\.5 at most.*in trace r0-0\b"):
        list(trainer(run).train_round(with_silent(make_round(student_logprobs=wrong), SILENT)))
    list(trainer(run).train_round(with_silent(make_round(student_logprobs=known), SILENT)))


def test_a_step_without_any_signal_still_moves_by_its_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW goes on with the moments of earlier steps, and its weight decay too, as with a gradient of zeros."""
    run, after = tiny_run("train.batch_traces=12", "train.weight_decay=0.1"), []
    for limit in (np.inf, 0):
        monkeypatch.setattr(batches, "SILENT", limit)
        made = trainer(run)
        list(made.train_round(make_round()))
        before = {name: p.detach().clone() for name, p in made.parameters().items()}
        (metrics,) = made.train_round(with_silent(make_round(1), list(range(12))))
        assert metrics["loss"] == metrics["grad_norm"] == 0
        assert any(not torch.equal(before[name], p) for name, p in made.parameters().items())
        after.append({name: p.detach().clone() for name, p in made.parameters().items()})
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


@pytest.mark.parametrize("settings", [("name=reward_opd",), ("name=sdar",), ("name=opd",), ("name=fkl",), ("kl=0.1",)])
def test_an_objective_that_learns_without_an_advantage_has_no_silent_traces(settings: tuple[str, ...]) -> None:
    more = ("score.keep_topk=20", "score.base_logprobs=true")
    run = tiny_run(*more, *(f"objective.{text}" for text in settings))
    traces = batches.usable(with_silent(make_round(), SILENT), 0)
    assert not batches.silent(traces, np.arange(12), run.objective, 1e12).any()
    assert batches.silent(traces, np.arange(12), tiny_run().objective, 1e12).nonzero()[0].tolist() == SILENT


def test_a_small_model_keeps_its_passes() -> None:
    data = with_silent(make_round(), SILENT)
    traces, constants = batches.usable(data, 0), tiny_run().objective
    work = traces.lengths[SILENT].sum()  # weights that a pass of one weight a layer would touch
    assert not batches.silent(traces, np.arange(12), constants, 0.9 * batches.SILENT / work).any()
    assert batches.silent(traces, np.arange(12), constants, 1.1 * batches.SILENT / work).any()
    metrics, _ = trained(tiny_run(), data)
    assert len(metrics) == 2
