"""Gradients under many token weights at once, against the trainer's own loss, one set of weights at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_rounds import make_round, tiny_run

from pipeline.training import batches, gradients
from pipeline.training.student import student
from pipeline.training.student.head import Terms


@pytest.fixture(scope="module")
def sample():
    """A student whose adapter is away from its start, traces, rows, and three sets of token weights."""
    run = tiny_run()
    model = student.build(run, torch.device("cpu")).eval()
    noise = torch.Generator().manual_seed(0)
    for name, p in model.model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.05, generator=noise)
    traces = batches.usable(make_round(), 0)
    rows = np.array([1, 4, 5, 8, 11])
    size = int(traces.response_tokens.lengths[rows].sum())
    weights = [np.random.default_rng(seed).normal(size=size).astype(np.float32) for seed in range(3)]
    return model, traces, rows, weights


def one_by_one(model, traces, rows, weights):
    """The gradient of the loss, trace by trace, through `Student.forward`."""
    parameters = [p for p in model.model.parameters() if p.requires_grad]
    total, start = torch.zeros(sum(p.numel() for p in parameters)), 0
    for row in rows:
        micro = batches.micro_batch(traces, np.array([row]))
        end = start + len(micro.targets)
        loss, _ = model(micro.tokens, micro.sources, Terms(micro.targets, torch.from_numpy(-weights[start:end])))
        total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        start = end
    return total


@pytest.mark.parametrize("budget", [40, 96, 10_000])
def test_gradients_are_the_losses_own(sample, budget):
    model, traces, rows, weights = sample
    found = gradients.gradients(model, traces, rows, weights, budget)
    for k, weight in enumerate(weights):
        expected = one_by_one(model, traces, rows, weight)
        assert float((found[k] - expected).norm() / expected.norm()) < 1e-5


def test_cosines_are_of_the_gradients_and_nan_where_there_is_none(sample):
    model, traces, rows, (one, other, _) = sample
    zero = np.zeros_like(one)
    found = gradients.cosines(model, traces, rows, [one, 2 * one, -one, other, zero], [one, one, one, one, one], 96)
    a, b = (one_by_one(model, traces, rows, weight) for weight in (one, other))
    assert found[:4] == pytest.approx([1, 1, -1, float(a @ b / (a.norm() * b.norm()))], abs=1e-5)
    assert np.isnan(found[4])
