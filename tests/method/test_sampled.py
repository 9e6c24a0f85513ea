"""Objectives on sampled tokens against numbers by hand; the golden minibatch has d, A and masks of two traces."""

from __future__ import annotations

from dataclasses import replace
from math import exp

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minibatches import Batch, batches, golden_signals, weights_of

from pipeline.config import Objective
from pipeline.method import objective
from pipeline.method.objective.sampled import discounted

# log T - log S of the golden minibatch (method/README.md)
D1, D2 = (0.05, 0.5, 0.0, -0.3, -0.05, 0.6), (-0.5, 0.0, 0.5, 0.0)


def rows(name: str, **constants: object) -> tuple[list[float], list[float]]:
    """Token advantages of both golden traces."""
    signals = golden_signals()
    signals = replace(signals, rollout_logprobs=signals.student_logprobs)
    weights = weights_of(signals, Objective(name=name, **constants))
    return weights[0].tolist(), weights[1, :4].tolist()


def test_opd_is_the_difference_of_the_logprobs() -> None:
    assert rows("opd")[0] == pytest.approx(D1)
    assert rows("opd")[1] == pytest.approx(D2)


def test_reward_opd_adds_it_to_the_advantage() -> None:
    first, second = rows("reward_opd", opd_coefficient=0.3)
    assert first == pytest.approx([0.8 + 0.3 * d for d in D1])
    assert second == pytest.approx([-1.25 + 0.3 * d for d in D2])


def test_iw_opd_weighs_a_token_by_the_disagreement_that_follows() -> None:
    # sum |a| of trace 2 is 1.0; before its tokens lie 0, .5, .5 and 1.0: factors 1.5, 1.25, 1.25 and 1.0
    assert rows("iw_opd")[1] == pytest.approx([-0.5 * 1.5, 0.0, 0.5 * 1.25, 0.0])
    # trace 1: sum 1.5, before .0 .05 .55 .55 .85 .9
    before = (0.0, 0.05, 0.55, 0.55, 0.85, 0.9)
    assert rows("iw_opd")[0] == pytest.approx([d * (1 + 0.5 * (1 - b / 1.5)) for d, b in zip(D1, before, strict=True)])
    assert rows("iw_opd", iw_growth=0.0) == (pytest.approx(D1), pytest.approx(D2))


def test_iw_opd_without_any_disagreement_is_finite() -> None:
    signals = golden_signals()
    same = replace(signals, teacher_logprobs=signals.student_logprobs, rollout_logprobs=signals.student_logprobs)
    assert (weights_of(same, Objective(name="iw_opd")) == 0).all()
    with pytest.raises(ValueError, match="rollout_logprobs: iw_opd needs it"):
        weights_of(signals, Objective(name="iw_opd"))


def test_sdar_adds_a_sigmoid_without_the_factor_d() -> None:
    expected = [0.8 + 0.1 / (1 + exp(-5 * d)) for d in D1]  # .8562, .8924, .85, .8182, .8438, .8953
    assert rows("sdar")[0] == pytest.approx(expected)
    assert rows("sdar")[0][:3] == pytest.approx([0.856218, 0.892414, 0.85], abs=1e-6)


def test_sdar_has_the_gradient_of_the_source() -> None:
    """The source minimises .1 sg(sigmoid(5 d)) (log T - log S) beside the loss of the advantage: a weight is what log S gains."""
    signals = golden_signals()
    student = signals.student_logprobs.clone().requires_grad_()
    delta = signals.teacher_logprobs - student
    (0.1 * torch.sigmoid(5 * delta).detach() * delta)[signals.mask].sum().backward()
    gained = weights_of(signals, Objective(name="sdar")) - weights_of(signals, Objective(name="grpo"))
    torch.testing.assert_close(gained[signals.mask], -student.grad[signals.mask])


def test_minillm_sums_what_follows() -> None:
    # trace 2, gamma 1: sums 0, .5, .5, 0 over 4, 3, 2, 1 tokens
    assert rows("minillm")[1] == pytest.approx([0.0, 0.5 / 3, 0.25, 0.0])
    assert rows("minillm", minillm_mean=False)[1] == pytest.approx([0.0, 0.5, 0.5, 0.0])
    # gamma .5: -.5 + .25 x .5, .5 x .5, .5, 0
    assert rows("minillm", minillm_mean=False, minillm_gamma=0.5)[1] == pytest.approx([-0.375, 0.25, 0.5, 0.0])
    assert rows("minillm", minillm_gamma=0.5)[1] == pytest.approx([-0.375 / 1.875, 0.25 / 1.75, 0.5 / 1.5, 0.0])
    assert rows("minillm", minillm_gamma=0.0)[0] == pytest.approx(D1)


def test_sft_is_cross_entropy() -> None:
    signals = golden_signals()
    weights = weights_of(signals, Objective(name="sft"))
    found = objective.loss(signals.student_logprobs, weights, signals.mask)
    assert float(found) == pytest.approx(float(-signals.student_logprobs[signals.mask].mean()))


@given(batches(), st.sampled_from([0.0, 0.5, 0.97, 1.0]))
@settings(max_examples=40, deadline=None)
def test_a_discounted_sum_is_the_recurrence(batch: Batch, gamma: float) -> None:
    values = objective.delta(batch.signals)
    found = discounted(values, gamma)
    expected, later = torch.zeros_like(values), torch.zeros(len(values), dtype=values.dtype)
    for t in range(values.shape[1] - 1, -1, -1):
        later = expected[:, t] = values[:, t] + gamma * later
    torch.testing.assert_close(found, expected)


# ---- gates on any objective


@given(batches(), st.sampled_from(["grpo", "opd", "minillm", "sdar", "sft"]), st.sampled_from(["entropy", "cl_entropy"]))
@settings(max_examples=30, deadline=None)
def test_a_gate_is_a_factor(batch: Batch, name: str, gate: str) -> None:
    plain = weights_of(batch.signals, Objective(name=name, gamma=1.0))
    omega = objective.confidence(batch.signals, Objective(name=name, gate=gate, gamma=1.0))
    gated = weights_of(batch.signals, Objective(name=name, gate=gate, gamma=1.0))
    torch.testing.assert_close(gated, (plain * omega).masked_fill(~batch.signals.mask, 0))


def test_the_own_gates_are_those_of_the_paper() -> None:
    signals = golden_signals()
    for name, gate in (("egrsd", "entropy"), ("cl_egrsd", "cl_entropy")):
        assert torch.equal(weights_of(signals, Objective(name=name)), weights_of(signals, Objective(name="egrsd", gate=gate)))
    off = Objective(name="cl_egrsd", gate="off")
    torch.testing.assert_close(weights_of(signals, off), weights_of(signals, Objective(name="egrsd", gamma=0.0)))


def test_top_entropy_lets_the_tokens_of_highest_entropy_learn() -> None:
    signals = golden_signals()
    student = torch.arange(12.0, dtype=torch.float64).reshape(2, 6)  # ten tokens: 0 to 5 and 6 to 9
    signals = replace(signals, student_entropy=student)
    chosen = weights_of(signals, Objective(name="grpo", gate="top_entropy:0.2"))
    assert chosen[0].tolist() == [0.0] * 6
    assert chosen[1].tolist() == [0.0, 0.0, -1.25, -1.25, 0.0, 0.0]  # two of ten tokens: 8 and 9
    least = weights_of(signals, Objective(name="grpo", gate="top_entropy:0.2", control="inverted"))
    assert least[0].tolist() == [0.8, 0.8, 0.0, 0.0, 0.0, 0.0]
    even = weights_of(signals, Objective(name="grpo", gate="top_entropy:0.2", control="uniform"))
    assert even[0].tolist() == pytest.approx([0.2 * 0.8] * 6)
    mixed = weights_of(signals, Objective(name="grpo", gate="top_entropy:0.2", control="shuffled"))
    assert int((mixed != 0).sum()) == 2
    with pytest.raises(ValueError, match="student_entropy: the gate top_entropy needs it"):
        weights_of(golden_signals(), Objective(name="grpo", gate="top_entropy:0.2"))


@given(st.lists(st.floats(0, 5), min_size=1, max_size=40), st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_the_threshold_lets_the_share_pass(values: list[float], share: float) -> None:
    found = torch.tensor(values, dtype=torch.float64)
    passed = int((found >= objective.threshold(found, share)).sum())
    assert passed >= share * len(values) - 1e-6
    assert int((found > objective.threshold(found, share)).sum()) < share * len(values) + 1


def test_eopd_learns_the_distribution_where_the_teacher_is_uncertain() -> None:
    weights = objective.divergence_weights(golden_signals(), Objective(name="eopd"))
    assert weights[0].tolist() == [0.0, 1.0, 0.0, 1.0, 1.0, 1.0]  # entropies above .8 nat
    assert weights[1].tolist() == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert objective.divergence_weights(golden_signals(), Objective(name="opd")) is None


# ---- norms


def test_denominators_by_hand() -> None:
    mask = golden_signals().mask  # six and four tokens
    assert objective.denominators(mask, 10, 2, 72, "token") == 10
    assert objective.denominators(mask, 10, 2, 72, "constant") == 144
    assert objective.denominators(mask, 10, 2, 72, "sequence").tolist() == [12.0] * 6 + [8.0] * 4
    ones = torch.ones(10)
    assert float((ones / objective.denominators(mask, 10, 2, 72, "sequence")).sum()) == pytest.approx(1.0)
