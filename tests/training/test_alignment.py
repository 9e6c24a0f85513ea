"""Gradients and their product with a direction, against autograd and central differences on the tiny reasoner."""

import numpy as np
import pytest
import torch

from pipeline.errors import ModelError
from pipeline.training import batches
from pipeline.training.alignment import Directions
from pipeline.training.step import Trainer
from pipeline.training.student import student
from tests.training.training_rounds import make_round, tiny_run


@pytest.fixture(params=["weights", "adapter"])
def space(request):
    return Directions(student.build(tiny_run(), torch.device("cpu")), request.param)


def micro(packed=False):
    traces = batches.usable(make_round(num_traces=4), 0)
    [found] = batches.share(traces, np.arange(len(traces.trace_ids)), 0, 1, 10_000, packed)
    return found


def logprobs(space, batch):
    """Of every response token, from the model's own logits -> [N]."""
    logits = space.student.model(input_ids=batch.tokens, use_cache=False).logits.flatten(0, 1)[batch.sources]
    return logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]


def test_gradients_are_those_of_autograd(space):
    batch = micro()
    weights = torch.randn(2, len(batch.targets), generator=torch.Generator().manual_seed(0))
    found = space.gradients(batch, list(weights), {})
    assert found.shape == (2, space.size)
    for flow, weight in zip(found, weights, strict=True):
        parts = torch.autograd.grad((logprobs(space, batch) * weight).sum(), list(space.named.values()))
        torch.testing.assert_close(flow, torch.cat([part.flatten() for part in parts]), atol=2e-4, rtol=2e-3)


def test_alignments_are_products_of_token_gradients_with_the_direction(space):
    """The weighted sum of the alignments is the product of the weighted gradient with the direction, for any weights."""
    batch = micro()
    weights = torch.randn(3, len(batch.targets), generator=torch.Generator().manual_seed(1))
    flows = space.gradients(batch, list(weights), {})
    direction = flows[0] / flows[0].norm()
    aligned = space.alignments(batch, direction)[0]
    torch.testing.assert_close(weights @ aligned, flows @ direction, atol=1e-3, rtol=1e-3)


def test_a_packed_micro_batch_has_the_same_gradients_and_alignments(space):
    assert space.student.packs
    padded, packed = micro(), micro(packed=True)
    assert packed.layout is not None
    direction = torch.randn(space.size, generator=torch.Generator().manual_seed(4))
    flows, aligned = [], []
    for batch in (padded, packed):
        flows.append(space.gradients(batch, [batch.targets % 3 - 1.0], {})[0])
        aligned.append(
            dict(zip(batch.trace_ids, space.alignments(batch, direction)[0].split(batch.mask.sum(1).tolist()), strict=True))
        )
    torch.testing.assert_close(*flows, atol=2e-4, rtol=2e-3)
    for trace, values in aligned[0].items():
        torch.testing.assert_close(values, aligned[1][trace], atol=1e-3, rtol=1e-3)


def test_a_merged_adapter_has_the_gradients_of_the_model_beside_it():
    """By all weights, after the adapter has moved."""
    found = []
    for merged in (True, False):
        model = student.build(tiny_run(), torch.device("cpu"))
        for name, parameter in model.model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05
        space = Directions(model, "weights")
        if not merged:
            model.model.unmerge_adapter()
        batch = micro()
        found.append(space.gradients(batch, [torch.ones(len(batch.targets))], {})[0])
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["fkl", "eopd", "gkd", "opsd", "egrsd"])
def test_an_objective_has_the_gradient_that_trains_with_its_divergence(name):
    """-dL of the trainer's own backward pass, times the tokens of the minibatch; and the alignments are its product with r."""
    run = tiny_run(f"objective.name={name}", "score.keep_topk=20", "train.micro_batch_tokens=10000")
    model = student.build(run, torch.device("cpu"))
    for place, parameter in enumerate(p for p in model.model.parameters() if p.requires_grad):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place)) * 0.05
    trainer = Trainer(run, model, torch.device("cpu"))
    traces = batches.usable(make_round(num_traces=4), 0, run.objective)
    [batch] = batches.share(traces, np.arange(4), 0, 1, 10_000)
    with torch.no_grad():  # a loss that reads log-probs is taken at the stored ones, so they must be the model's
        batch.student_logprobs[batch.mask] = logprobs(Directions(model, "adapter"), batch)
    expected = -trainer.gradient([batch]) * len(batch.targets)
    [weights], divergences = trainer.weights([batch]), trainer.divergences([batch])
    assert len(divergences) == (name != "egrsd")
    space = Directions(model, "adapter")
    [flow] = space.gradients(batch, [weights], dict(enumerate(divergences)))
    torch.testing.assert_close(flow, expected, atol=2e-4, rtol=2e-3)
    direction = torch.randn(space.size, generator=torch.Generator().manual_seed(7))
    aligned, falls = space.alignments(batch, direction, divergences)
    total = weights @ aligned + sum(fall.sum() for fall in falls)
    torch.testing.assert_close(total, flow @ direction, atol=2e-3, rtol=1e-3)


def test_a_model_that_is_trained_whole_has_no_adapter():
    with pytest.raises(ModelError, match=r"no adapter.*Audit `weights`"):
        Directions(student.build(tiny_run("model.tuning=full"), torch.device("cpu")), "adapter")


def test_alignments_are_central_differences():
    space = Directions(student.build(tiny_run(), torch.device("cpu")), "weights")
    batch, step = micro(), 0.05
    direction = torch.randn(space.size, generator=torch.Generator().manual_seed(2))
    direction /= direction.norm()
    aligned = space.alignments(batch, direction)[0]
    found = []
    for sign in (1, -2):
        for parameter, part in zip(space.named.values(), direction.split(space.sizes), strict=True):
            parameter.data += sign * step * part.view_as(parameter)
        with torch.no_grad():
            found.append(logprobs(space, batch))
    torch.testing.assert_close(aligned, (found[0] - found[1]) / (2 * step), atol=2e-3, rtol=2e-2)
