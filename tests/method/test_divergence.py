"""Divergences on the teacher's most likely tokens: golden values, and gradients against autograd on full logits in float64."""

from __future__ import annotations

from functools import partial
from math import exp, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config import Objective
from pipeline.method import objective
from pipeline.method.objective.divergence import Measure

SUPPORTS = ("tail", "renormalised", "truncated")
MEASURES: dict[str, Measure] = {
    "fkl": objective.forward_kl,
    "reverse": objective.reverse_kl,
    "gkd": partial(objective.jensen_shannon, beta=0.3),
    "opsd": partial(objective.clamped_forward_kl, clamp=0.05, num_kept=5),
}
CASES = pytest.mark.parametrize(("name", "support"), [(name, support) for name in MEASURES for support in SUPPORTS])


def logs(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64).log()


def drawn(seed: int, size: int = 7, vocab: int = 40, top: int = 5, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student logits [n, V], targets [n], the teacher's top ids and log-probs [n, K]; float64."""
    torch.manual_seed(seed)
    logits, teacher = (torch.randn(size, vocab, dtype=torch.float64) * spread for _ in range(2))
    best = (teacher + 0.5 * logits).log_softmax(1).topk(top)
    return logits, torch.randint(vocab, (size,)), best.indices, best.values


def plain(logits: Tensor, ids: Tensor, kept: Tensor, name: str, support: str) -> Tensor:
    """The divergence [n] in the plainest way: probabilities of all tokens, a sum over cells, and autograd."""
    student, teacher = logits.softmax(1).gather(1, ids), kept.exp()
    if support == "renormalised":
        student, teacher = student / student.sum(1, keepdim=True), teacher / teacher.sum(1, keepdim=True)
    if support == "tail":
        student, teacher = (torch.cat((side, 1 - side.sum(1, keepdim=True)), 1) for side in (student, teacher))
    if name == "fkl":
        cells = teacher * (teacher / student).log()
    elif name == "reverse":
        cells = student * (student / teacher).log()
    elif name == "gkd":
        middle = 0.7 * student + 0.3 * teacher
        cells = 0.3 * teacher * (teacher / middle).log() + 0.7 * student * (student / middle).log()
    else:
        cells = teacher * (teacher / student).log()
        cells = torch.cat((cells[:, :5].clamp(max=0.05), cells[:, 5:]), 1)
    return cells.sum(1)


# ---- golden: T = (.6, .3 | .1), S = (.5, .2 | .3), two kept tokens and the tail


def golden(name: str, support: str, **constants: object) -> float:
    measure = objective.measure_of(Objective(name=name, **constants), 2) if name != "reverse" else objective.reverse_kl
    return float(objective.divergence(logs(0.6, 0.3), logs(0.5, 0.2), logs(0.3)[:, 0], measure, support).values)


def test_golden_values_with_their_arithmetic() -> None:
    truncated = 0.6 * log(0.6 / 0.5) + 0.3 * log(0.3 / 0.2)  # .10939 + .12164
    assert golden("fkl", "truncated") == pytest.approx(truncated) == pytest.approx(0.231033, abs=1e-6)
    assert golden("fkl", "tail") == pytest.approx(truncated + 0.1 * log(0.1 / 0.3)) == pytest.approx(0.121172, abs=1e-6)
    renormalised = 2 / 3 * log((2 / 3) / (5 / 7)) + 1 / 3 * log((1 / 3) / (2 / 7))
    assert golden("fkl", "renormalised") == pytest.approx(renormalised) == pytest.approx(0.005388, abs=1e-6)
    assert golden("opsd", "tail") == pytest.approx(0.05 + 0.05 + 0.1 * log(0.1 / 0.3)) == pytest.approx(-0.009861, abs=1e-6)
    reverse = 0.5 * log(0.5 / 0.6) + 0.2 * log(0.2 / 0.3) + 0.3 * log(0.3 / 0.1)  # -.09116 - .08109 + .32958
    assert golden("reverse", "tail") == pytest.approx(reverse) == pytest.approx(0.157330, abs=1e-6)
    assert golden("reverse", "truncated") < 0  # a truncated reverse KL can be negative


def test_golden_jensen_shannon_and_its_ends() -> None:
    def both(beta: float) -> float:
        pairs = [(t, s, beta * t + (1 - beta) * s) for t, s in ((0.6, 0.5), (0.3, 0.2), (0.1, 0.3))]
        return sum(beta * t * log(t / m) + (1 - beta) * s * log(s / m) for t, s, m in pairs)

    # m = (.55, .25, .2): .5 (.05221 + .05470 - .06931) + .5 (-.04766 - .04463 + .12164)
    assert golden("gkd", "tail", gkd_beta=0.5) == pytest.approx(both(0.5)) == pytest.approx(0.033472, abs=1e-6)
    assert golden("gkd", "tail", gkd_beta=0.9) == pytest.approx(both(0.9))
    assert golden("gkd", "tail", gkd_beta=0.0) == golden("fkl", "tail")
    assert golden("gkd", "tail", gkd_beta=1.0) == golden("reverse", "tail")


# ---- values and gradients with respect to logits


@CASES
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_are_those_of_autograd_on_full_logits(name: str, support: str, seed: int) -> None:
    logits, targets, ids, kept = drawn(seed)
    weights, coefficients = torch.rand(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    expected = plain(leaf, ids, kept, name, support)
    logprobs = leaf.log_softmax(1).gather(1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad((weights * expected + coefficients * logprobs).sum(), leaf)
    found = objective.head_gradient_(logits, targets, coefficients, objective.Kept(ids, kept, weights), MEASURES[name], support)
    torch.testing.assert_close(found[0], logprobs.detach(), atol=1e-13, rtol=0)
    torch.testing.assert_close(found[1], expected.detach(), atol=1e-13, rtol=0)
    torch.testing.assert_close(logits, gradient, atol=1e-13, rtol=0)  # the logits have become the gradient


@given(st.integers(0, 2**31), st.sampled_from(sorted(MEASURES)), st.sampled_from(SUPPORTS), st.sampled_from([0.3, 3.0, 12.0]))
@settings(max_examples=60, deadline=None)
def test_gradients_sum_to_zero_and_do_not_see_a_shift(seed: int, name: str, support: str, spread: float) -> None:
    """Adding a constant to all logits changes no probability, so a row of the gradient sums to 0."""
    logits, targets, ids, kept = drawn(seed, spread=spread)
    stored = objective.Kept(ids, kept, torch.ones(7, dtype=torch.float64))
    shifted, zero = logits + 300, torch.zeros(7, dtype=torch.float64)
    one = objective.head_gradient_(logits, targets, zero, stored, MEASURES[name], support)
    other = objective.head_gradient_(shifted, targets, zero, stored, MEASURES[name], support)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.sum(1), zero, atol=1e-12, rtol=0)
    torch.testing.assert_close(one[1], other[1], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(logits, shifted, atol=1e-9, rtol=1e-9)


@given(st.integers(0, 2**31), st.sampled_from(["fkl", "reverse", "gkd"]), st.sampled_from(["tail", "renormalised"]))
@settings(max_examples=40, deadline=None)
def test_a_divergence_is_not_negative_and_zero_from_itself(seed: int, name: str, support: str) -> None:
    logits, targets, ids, kept = drawn(seed)
    own = logits.log_softmax(1).gather(1, ids)
    for teacher, least in ((kept, 0.0), (own, None)):
        stored = objective.Kept(ids, teacher, torch.ones(7, dtype=torch.float64))
        work = logits.clone()
        values = objective.head_gradient_(work, targets, torch.zeros(7).double(), stored, MEASURES[name], support)[1]
        if least is None:
            assert values.abs().max() < 1e-12
            assert work.abs().max() < 1e-12
        else:
            assert values.min() >= -1e-13


def test_a_thin_tail_of_a_sure_student_is_not_lost() -> None:
    """log(1 - sum p) is -inf here in float32. The logsumexp over the other logits keeps it."""
    logits = torch.zeros(1, 50)
    logits[0, :2] = torch.tensor([60.0, 58.0])
    ids, kept = torch.tensor([[0, 1]]), logs(0.7, 0.2).float()
    tail = log(48) - 60 - log(1 + exp(-2))  # 48 tokens of logit 0 against exp(60) + exp(58)
    expected = plain(logits.double(), ids, kept.double(), "fkl", "truncated") + 0.1 * (log(0.1) - tail)
    stored = objective.Kept(ids, kept, torch.ones(1))
    values = objective.head_gradient_(logits, torch.tensor([0]), torch.zeros(1), stored, objective.forward_kl, "tail")[1]
    assert float(values) == pytest.approx(float(expected), rel=1e-5)
    assert logits.isfinite().all()
    assert float(logits[0, 2:].sum()) == pytest.approx(-0.1, rel=1e-4)  # S - T on the tail


@pytest.mark.parametrize("support", SUPPORTS)
def test_all_tokens_kept_is_the_full_divergence(support: str) -> None:
    logits, targets, ids, kept = drawn(3, vocab=6, top=6)
    full = plain(logits, ids, kept, "fkl", "truncated")
    stored = objective.Kept(ids, kept, torch.ones(7, dtype=torch.float64))
    found = objective.head_gradient_(logits, targets, torch.zeros(7).double(), stored, objective.forward_kl, support)
    torch.testing.assert_close(found[1], full, atol=1e-9, rtol=0)
    assert logits.isfinite().all()


def test_the_teachers_tail_is_exact_where_one_token_has_nearly_all() -> None:
    kept = torch.tensor([[-1e-9, -30.0]])
    assert float(objective.log_tail(kept)) == pytest.approx(log(1e-9 - 9.4e-14), abs=1e-3)
    assert float(objective.log_tail(torch.tensor([[0.0, -40.0]]))) == -60.0  # nothing is left, and no infinity comes of it


def test_from_fewer_kept_tokens_opsd_is_less_than_from_all() -> None:
    """`opsd` is labelled approximate: what single tokens of the tail would add is in one bucket."""
    logits, targets, ids, kept = drawn(5, size=200, vocab=40, top=40)
    found = {}
    for top in (5, 20, 40):
        stored = objective.Kept(ids[:, :top], kept[:, :top], torch.ones(200, dtype=torch.float64))
        measure = objective.measure_of(Objective(name="opsd"), top)
        values = objective.head_gradient_(logits.clone(), targets, torch.zeros(200).double(), stored, measure, "tail")[1]
        found[top] = float(values.mean())
    assert abs(found[20] - found[40]) < abs(found[5] - found[40])


def test_what_is_no_measure_or_support_is_named() -> None:
    with pytest.raises(ValueError, match="'grpo' learns from sampled tokens alone"):
        objective.measure_of(Objective(name="grpo"), 4)
    with pytest.raises(ValueError, match="support: 'all'"):
        objective.divergence(logs(0.5), logs(0.5), logs(0.5)[:, 0], objective.forward_kl, "all")
