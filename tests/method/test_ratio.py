"""Clips, corrections and the KL to the base: values by hand, and slopes against autograd of the textbook losses in float64."""

from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config import Objective
from pipeline.method import objective
from pipeline.method.objective import ratio

LOW, HIGH = 0.2, 0.2


def drawn(seed: int) -> tuple[Tensor, objective.Ratios]:
    """Log-probs [N] of three traces, and what was stored of them; float64."""
    torch.manual_seed(seed)
    rows = torch.tensor([0] * 5 + [1] * 3 + [2] * 4)
    logprobs, student, rollout, base = (-torch.rand(12, dtype=torch.float64) * 2 for _ in range(4))
    return logprobs, objective.Ratios(torch.randn(12, dtype=torch.float64), student, rows, rollout, base)


def textbook(logprobs: Tensor, stored: objective.Ratios, kind: str) -> Tensor:
    """The loss of every token as its source writes it, for autograd."""
    gap = logprobs - stored.student
    if kind == "gspo":
        counts = torch.bincount(stored.rows).double()[stored.rows]
        mean = (torch.zeros(3, dtype=torch.float64).index_add(0, stored.rows, gap)[stored.rows] / counts).detach()
        gap = mean + logprobs - logprobs.detach()
    r, a = gap.exp(), stored.weights
    if kind == "cispo":
        return -r.clamp(1 - LOW, 1 + HIGH).detach() * a * logprobs
    return -torch.minimum(r * a, r.clamp(1 - LOW, 1 + HIGH) * a)


@given(st.integers(0, 2**31), st.sampled_from(["ppo", "gspo", "cispo"]))
@settings(max_examples=60, deadline=None)
def test_values_and_slopes_are_those_of_the_source(seed: int, kind: str) -> None:
    logprobs, stored = drawn(seed)
    leaf = logprobs.clone().requires_grad_()
    expected = textbook(leaf, stored, kind)
    (slopes,) = torch.autograd.grad(expected.sum(), leaf)
    found = objective.surrogate(logprobs, stored, Objective(name="grpo", clip=kind))
    torch.testing.assert_close(found.values, expected.detach(), atol=1e-13, rtol=0)
    torch.testing.assert_close(found.slopes, slopes, atol=1e-13, rtol=0)
    assert (found.trust == 1).all()


def test_ppo_by_hand() -> None:
    gap = torch.tensor([0.0, log(1.5), log(0.5), log(1.5), log(0.5)], dtype=torch.float64)
    values, slopes = ratio.ppo(gap, torch.tensor([2.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64), LOW, HIGH)
    assert values.tolist() == pytest.approx([-2.0, -1.2, -0.5, 1.5, 0.8])  # the worse of the two
    assert slopes.tolist() == pytest.approx([-2.0, 0.0, -0.5, 1.5, 0.0])


def test_with_the_policy_that_the_engine_measured_every_clip_is_the_plain_gradient() -> None:
    logprobs, stored = drawn(0)
    same = objective.Ratios(stored.weights, logprobs, stored.rows)
    for kind in ("ppo", "gspo", "cispo"):
        torch.testing.assert_close(objective.surrogate(logprobs, same, Objective(name="opd", clip=kind)).slopes, -stored.weights)


def test_corrections_by_hand() -> None:
    gap, rows = torch.tensor([log(3.0), log(0.5), log(1.5), log(1.5)]), torch.tensor([0, 1, 2, 2])
    assert ratio.correction(gap, rows, "token", 2.0).tolist() == pytest.approx([2.0, 0.5, 1.5, 1.5])
    # a trace's ratio is the product: 3, .5 and 2.25; the first is at the cap and stays
    assert ratio.correction(gap, rows, "sequence", 3.01).tolist() == pytest.approx([3.0, 0.5, 2.25, 2.25])
    assert ratio.correction(gap, rows, "sequence", 2.0).tolist() == pytest.approx([0.0, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_a_correction_multiplies_the_objective_and_its_divergence(kind: str) -> None:
    logprobs, stored = drawn(1)
    found = objective.surrogate(logprobs, stored, Objective(name="grpo", correction=kind))
    torch.testing.assert_close(found.values, -stored.weights * logprobs * found.trust)
    torch.testing.assert_close(found.slopes, -stored.weights * found.trust)
    assert found.trust.max() <= {"token": 2.0, "sequence": 3.0}[kind]


def test_the_kl_shows_k3_and_trains_with_the_gradient_of_the_reverse_kl() -> None:
    """Over all tokens of a vocabulary, the mean of (log p - log b) d log p is the gradient of KL(p, b). That of k3 is not."""
    torch.manual_seed(0)
    logits, base = torch.randn(9, dtype=torch.float64, requires_grad=True), torch.randn(9, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - base)).sum(), logits)
    logprobs = logits.log_softmax(0)
    stored = objective.Ratios(torch.zeros(9, dtype=torch.float64), base, torch.zeros(9, dtype=torch.int64), None, base)
    found = objective.surrogate(logprobs.detach(), stored, Objective(name="grpo", kl=1.0))
    (trained,) = torch.autograd.grad((logprobs.detach().exp() * found.slopes * logprobs).sum(), logits)
    torch.testing.assert_close(trained, expected, atol=1e-13, rtol=0)
    logprobs = logits.log_softmax(0)
    (as_loss,) = torch.autograd.grad((logprobs.detach().exp() * ratio.k3(logprobs, base)).sum(), logits)
    assert (as_loss - expected).abs().max() > 0.01
    values = ratio.k3(logprobs.detach(), base)
    assert values.min() >= 0
    assert float((logprobs.exp() * values).sum()) == pytest.approx(float((logprobs.exp() * (logprobs - base)).sum()))


def test_far_ratios_stay_finite() -> None:
    far = torch.tensor([-500.0, -0.1])
    stored = objective.Ratios(torch.ones(2), torch.tensor([-0.1, -500.0]), torch.tensor([0, 0]), torch.tensor([-0.1, -500.0]))
    for constants in ({"clip": "ppo"}, {"clip": "gspo"}, {"clip": "cispo"}, {"correction": "token"}, {"correction": "sequence"}):
        found = objective.surrogate(far, stored, Objective(name="grpo", **constants))
        assert all(part.isfinite().all() for part in found)


def test_sums_over_traces() -> None:
    assert ratio.trace_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1])).tolist() == [1.0, 6.0, 6.0]
    assert ratio.trace_sums(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
