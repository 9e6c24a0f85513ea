"""Gradients and their product with a direction, against autograd and central differences on the tiny reasoner."""

import numpy as np
import pytest
import torch

from pipeline.training import batches
from pipeline.training.alignment import Directions
from pipeline.training.student import student
from tests.training.training_rounds import make_round, tiny_run


@pytest.fixture(params=["weights", "adapter"])
def space(request):
    return Directions(student.build(tiny_run(), torch.device("cpu")), request.param)


def micro():
    traces = batches.usable(make_round(num_traces=4), 0)
    return batches.micro_batch(traces, np.arange(len(traces.trace_ids)))


def logprobs(space, batch):
    """Of every response token, from the model's own logits -> [N]."""
    logits = space.student.model(input_ids=batch.tokens, use_cache=False).logits.flatten(0, 1)[batch.sources]
    return logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]


def test_gradients_are_those_of_autograd(space):
    batch = micro()
    weights = torch.randn(2, len(batch.targets), generator=torch.Generator().manual_seed(0))
    found = space.gradients(batch, list(weights))
    assert found.shape == (2, space.size)
    for flow, weight in zip(found, weights, strict=True):
        parts = torch.autograd.grad((logprobs(space, batch) * weight).sum(), list(space.named.values()))
        torch.testing.assert_close(flow, torch.cat([part.flatten() for part in parts]), atol=2e-4, rtol=2e-3)


def test_alignments_are_products_of_token_gradients_with_the_direction(space):
    """The weighted sum of the alignments is the product of the weighted gradient with the direction, for any weights."""
    batch = micro()
    weights = torch.randn(3, len(batch.targets), generator=torch.Generator().manual_seed(1))
    flows = space.gradients(batch, list(weights))
    direction = flows[0] / flows[0].norm()
    aligned = space.alignments(batch, direction).detach()
    torch.testing.assert_close(weights @ aligned, flows @ direction, atol=1e-3, rtol=1e-3)


def test_alignments_are_central_differences():
    space = Directions(student.build(tiny_run(), torch.device("cpu")), "weights")
    batch, step = micro(), 0.05
    direction = torch.randn(space.size, generator=torch.Generator().manual_seed(2))
    direction /= direction.norm()
    aligned = space.alignments(batch, direction).detach()
    found = []
    for sign in (1, -2):
        for parameter, part in zip(space.named.values(), direction.split(space.sizes), strict=True):
            parameter.data += sign * step * part.view_as(parameter)
        with torch.no_grad():
            found.append(logprobs(space, batch))
    torch.testing.assert_close(aligned, (found[0] - found[1]) / (2 * step), atol=2e-3, rtol=2e-2)
