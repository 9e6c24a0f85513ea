"""The token weights and the loss: golden vector, traps, properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import arithmetic
from hypothesis import given, settings
from hypothesis import strategies as st
from minibatches import COLUMNS, Batch, batches, flat, gates, golden_signals, objectives, pad, padded, select, weights_of

from pipeline.config import Objective
from pipeline.method import objective

GOLDEN = arithmetic.GOLDEN
CASES = pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"gamma{c['gamma']}-W{c['window']}")


# ---- golden vector


def test_golden_arithmetic_gives_the_figures() -> None:
    assert flat(arithmetic.magnitudes()) == pytest.approx(flat(GOLDEN["magnitude"]), abs=5e-5)
    for case in GOLDEN["cases"]:
        assert flat(arithmetic.gates(case["gamma"], case["window"])) == pytest.approx(flat(case["gate"]), abs=5e-5)
        assert arithmetic.loss(case["gamma"], case["window"]) == pytest.approx(case["loss"], abs=5e-7)


def test_golden_magnitude_and_peak() -> None:
    signals = golden_signals()
    w = objective.magnitude(signals.teacher_logprobs, signals.student_logprobs, signals.advantage.sign(), 0.2)
    assert w[signals.mask].tolist() == pytest.approx(flat(arithmetic.magnitudes()), abs=1e-12)
    assert float(signals.normaliser) == GOLDEN["peak"]


@CASES
def test_golden_gate_weights_and_loss(case: dict) -> None:
    signals = golden_signals()
    constants = Objective(gamma=case["gamma"], window=case["window"])
    lowest = objective.lookahead_min(signals.teacher_entropy, signals.mask, case["window"])
    omega = objective.gate(lowest, signals.normaliser, constants)
    assert omega[signals.mask].tolist() == pytest.approx(flat(arithmetic.gates(case["gamma"], case["window"])), abs=1e-12)
    weights = weights_of(signals, constants)
    expected = padded([[a] * len(row) for a, row in zip(GOLDEN["advantage"], GOLDEN["entropy"], strict=True)])
    expected *= padded(arithmetic.magnitudes()) * padded(arithmetic.gates(case["gamma"], case["window"]))
    torch.testing.assert_close(weights, expected.nan_to_num(0.0))
    loss = objective.loss(signals.student_logprobs, weights, signals.mask)
    assert float(loss) == pytest.approx(case["loss"], abs=5e-7)
    single = objective.loss(signals.student_logprobs.float(), weights.float(), signals.mask)
    assert float(single) == pytest.approx(case["loss"], abs=1e-6)


# ---- traps of the method


def test_trap_1_the_normaliser_is_of_the_raw_entropies() -> None:
    signals = golden_signals()
    before = signals.teacher_entropy.clone()
    lowest = objective.lookahead_min(signals.teacher_entropy, signals.mask, 5)
    torch.testing.assert_close(signals.teacher_entropy, before, equal_nan=True)  # nothing was overwritten
    assert float(objective.normaliser(signals.teacher_entropy, signals.mask, Objective())) == 3.0
    literal = objective.normaliser(lowest, signals.mask, Objective())  # Algorithm 1 read literally
    assert float(literal) == pytest.approx(1.7)
    constants = Objective(gamma=1.0, window=5)
    assert not torch.allclose(weights_of(signals, constants), weights_of(replace(signals, normaliser=literal), constants))


def test_trap_2_the_maximum_spans_micro_batches() -> None:
    signals, constants = golden_signals(), Objective(gamma=1.0, window=0)
    parts = [select(signals, slice(row, row + 1)) for row in range(2)]
    peaks = [objective.normaliser(part.teacher_entropy, part.mask, constants) for part in parts]
    assert [float(p) for p in peaks] == [2.0, 3.0]
    whole = weights_of(signals, constants)
    together = torch.cat([weights_of(replace(part, normaliser=max(peaks)), constants) for part in parts])
    torch.testing.assert_close(together, whole)
    alone = torch.cat([weights_of(replace(part, normaliser=p), constants) for part, p in zip(parts, peaks, strict=True)])
    assert not torch.allclose(alone, whole)


def test_the_normaliser_has_a_least_value_and_takes_an_empty_batch() -> None:
    entropy, mask = torch.tensor([[0.2, 9.0]]), torch.tensor([[True, False]])
    assert float(objective.normaliser(entropy, mask, Objective())) == 1.0
    assert float(objective.normaliser(entropy, mask, Objective(min_normaliser=0.1))) == pytest.approx(0.2)
    assert float(objective.normaliser(entropy, torch.zeros_like(mask), Objective())) == 1.0


# ---- properties


@given(batches(), st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_lookahead_is_the_minimum_of_its_window(batch: Batch, window: int) -> None:
    entropy, mask = batch.signals.teacher_entropy, batch.signals.mask
    lowest = objective.lookahead_min(entropy, mask, window)
    for row, length in enumerate(mask.sum(1).tolist()):
        values = entropy[row, :length].tolist()
        assert lowest[row, :length].tolist() == [min(values[t : t + window + 1]) for t in range(length)]
    assert (lowest[~mask] == torch.inf).all()
    assert (lowest[mask] <= entropy[mask]).all()
    assert (objective.lookahead_min(entropy, mask, window + 1)[mask] <= lowest[mask]).all()
    constant = torch.where(mask, 2.5, entropy)
    assert (objective.lookahead_min(constant, mask, window)[mask] == 2.5).all()


@given(batches(), objectives, st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_weights_and_loss_do_not_see_padding_or_neighbours(batch: Batch, constants: Objective, left: int, right: int) -> None:
    signals, columns = batch.signals, COLUMNS
    weights = weights_of(signals, constants)
    assert weights.isfinite().all()
    assert (weights[~signals.mask] == 0).all()
    wide = replace(signals, **{name: pad(getattr(signals, name), left, right) for name in columns})
    wide_weights = weights_of(wide, constants)
    torch.testing.assert_close(wide_weights[wide.mask], weights[signals.mask])
    loss = objective.loss(batch.logprobs, weights, signals.mask)
    assert loss.isfinite()
    torch.testing.assert_close(objective.loss(pad(batch.logprobs, left, right), wide_weights, wide.mask), loss)
    order = torch.arange(len(weights) - 1, -1, -1)
    turned = weights_of(select(signals, order), constants)
    torch.testing.assert_close(turned, weights[order])  # a row's weights depend on that row and on the shared peak alone
    torch.testing.assert_close(objective.loss(batch.logprobs[order], turned, signals.mask[order]), loss)


@given(batches(), st.floats(0, 10), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_gate_lies_between_floor_and_one_and_falls_with_entropy(batch: Batch, gamma: float, floor: float) -> None:
    entropy = batch.signals.teacher_entropy[batch.signals.mask].sort().values
    omega = objective.gate(entropy, batch.signals.normaliser, Objective(gamma=gamma, floor=floor))
    assert ((omega >= floor) & (omega <= 1)).all()
    assert (omega.diff() <= 0).all()
    assert (objective.gate(entropy, batch.signals.normaliser, Objective(gamma=0.0, floor=floor)) == 1).all()


@given(batches(), st.sampled_from([0.05, 0.2, 0.9]))
@settings(max_examples=40, deadline=None)
def test_magnitude_is_clipped_and_turns_with_the_advantage(batch: Batch, epsilon: float) -> None:
    signals, mask = batch.signals, batch.signals.mask
    both, ones = (signals.teacher_logprobs, signals.student_logprobs), torch.ones(len(mask))
    plus, minus = (objective.magnitude(*both, direction, epsilon)[mask] for direction in (ones, -ones))
    for w in (plus, minus):
        assert ((w >= 1 - epsilon) & (w <= 1 + epsilon)).all()
    delta = (signals.teacher_logprobs - signals.student_logprobs)[mask]
    torch.testing.assert_close(plus, delta.exp().clamp(1 - epsilon, 1 + epsilon))
    torch.testing.assert_close(minus, (1 / delta.exp()).clamp(1 - epsilon, 1 + epsilon))
    inside = delta.abs() < min(-torch.tensor(1 - epsilon).log(), torch.tensor(1 + epsilon).log())
    torch.testing.assert_close(plus[inside] * minus[inside], torch.ones(int(inside.sum()), dtype=torch.float64))


def test_magnitude_without_direction_is_one() -> None:
    w = objective.magnitude(torch.tensor([[-1.0]]), torch.tensor([[-9.0]]), torch.zeros(1), 0.2)
    assert w.tolist() == [[1.0]]


@given(batches(), objectives)
@settings(max_examples=40, deadline=None)
def test_gradient_flows_into_the_policy_alone(batch: Batch, constants: Objective) -> None:
    columns = ("advantage", "teacher_logprobs", "student_logprobs", "teacher_entropy")
    leaves = {name: getattr(batch.signals, name).clone().requires_grad_() for name in columns}
    signals = replace(batch.signals, **leaves)
    logprobs = batch.logprobs.clone().requires_grad_()
    weights = weights_of(signals, constants)
    objective.loss(logprobs, weights, signals.mask).backward()
    assert not weights.requires_grad
    assert all(leaf.grad is None for leaf in leaves.values())
    torch.testing.assert_close(logprobs.grad, -weights / signals.mask.sum())


def test_loss_ignores_a_gradient_that_weights_bring_along() -> None:
    mask, weights = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, requires_grad=True)
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    objective.loss(logprobs, weights, mask).backward()
    assert weights.grad is None
    assert logprobs.grad.tolist() == [[-0.5, -0.5]]


@given(batches(), objectives)
@settings(max_examples=20, deadline=None)
def test_sums_over_micro_batches_make_the_global_mean(batch: Batch, constants: Objective) -> None:
    """What the optimiser step does: coefficients of the global minibatch, a weighted sum for each micro-batch."""
    signals, weights = batch.signals, weights_of(batch.signals, constants)
    num_tokens = int(signals.mask.sum())
    rows = zip(batch.logprobs, weights, signals.mask, strict=True)
    parts = [objective.weighted_sum(p[m], objective.coefficients(w[m], num_tokens)) for p, w, m in rows]
    torch.testing.assert_close(torch.stack(parts).sum(), objective.loss(batch.logprobs, weights, signals.mask))


@given(batches(), objectives)
@settings(max_examples=20, deadline=None)
def test_coefficients_are_the_gradient_of_the_loss(batch: Batch, constants: Objective) -> None:
    signals, weights = batch.signals, weights_of(batch.signals, constants).requires_grad_()
    logprobs = batch.logprobs.clone().requires_grad_()
    objective.loss(logprobs, weights, signals.mask).backward()
    found = objective.coefficients(weights, int(signals.mask.sum()))
    assert not found.requires_grad
    assert torch.equal(found[signals.mask], logprobs.grad[signals.mask])


# ---- objectives against their formulas


def test_objectives_reduce_to_each_other() -> None:
    signals = golden_signals()
    no_gate = weights_of(signals, Objective(name="egrsd", gamma=0.0))
    always = Objective(name="rlsd", rlsd_lam=1.0, rlsd_decay_steps=0)
    torch.testing.assert_close(weights_of(signals, always), no_gate)
    no_window = weights_of(signals, Objective(name="cl_egrsd", window=0))
    torch.testing.assert_close(no_window, weights_of(signals, Objective(name="egrsd")))
    grpo = weights_of(signals, Objective(name="grpo"))
    assert grpo.tolist() == [[0.8] * 6, [-1.25] * 4 + [0.0] * 2]
    torch.testing.assert_close(weights_of(replace(signals, step=50), Objective(name="rlsd")), grpo)


# ---- controls: each keeps all of the gate but one thing


@given(batches(), st.sampled_from(["egrsd", "cl_egrsd"]), st.sampled_from([0.3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_a_shuffled_gate_has_a_traces_own_values_on_other_tokens(batch: Batch, name: str, gamma: float) -> None:
    signals = batch.signals
    plain, mixed = (gates(signals, name=name, gamma=gamma, gate=gate) for gate in ("entropy", "shuffled"))
    for row, mask in enumerate(signals.mask):
        assert plain[row, mask].sort().values.tolist() == mixed[row, mask].sort().values.tolist()
    other = gates(replace(signals, seeds=signals.seeds + 1), name=name, gamma=gamma, gate="shuffled")
    assert mixed.shape == other.shape
    again = gates(signals, name=name, gamma=gamma, gate="shuffled")
    torch.testing.assert_close(mixed, again, rtol=0, atol=0, equal_nan=True)


def test_a_shuffle_moves_tokens_and_another_seed_moves_them_elsewhere() -> None:
    values, mask = torch.arange(40.0)[None], torch.ones(1, 40, dtype=torch.bool)
    one, two = (objective.shuffle(values, mask, torch.tensor([seed])) for seed in (1, 2))
    assert (one != values).float().mean() > 0.8
    assert (one != two).float().mean() > 0.8
    assert one.sort().values.tolist() == values.tolist()


@given(batches(), st.sampled_from(["egrsd", "cl_egrsd"]), st.sampled_from([0.3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_a_uniform_gate_is_the_mean_of_the_gate(batch: Batch, name: str, gamma: float) -> None:
    signals, mask = batch.signals, batch.signals.mask
    plain, even = (gates(signals, name=name, gamma=gamma, gate=gate)[mask] for gate in ("entropy", "uniform"))
    assert float(even.mean()) == pytest.approx(float(plain.mean()))
    assert even.max() == even.min()


def test_an_inverted_gate_is_open_where_entropy_is_largest() -> None:
    signals = golden_signals()
    inverted = gates(signals, name="egrsd", gamma=0.3, gate="inverted")
    plain = gates(signals, name="egrsd", gamma=0.3)
    torch.testing.assert_close((inverted + plain)[signals.mask], torch.full((10,), 1.7, dtype=torch.float64))
    assert float(inverted[1, 0]) == 1.0  # M itself


def test_controls_at_gamma_zero_are_no_gate() -> None:
    for gate in ("entropy", "shuffled", "uniform", "inverted"):
        assert (gates(golden_signals(), gamma=0.0, gate=gate)[golden_signals().mask] == 1).all()


@pytest.mark.parametrize(("gate", "missing"), [("shuffled", "seeds"), ("uniform", "mean_gate")])
def test_a_control_without_what_it_needs_is_refused(gate: str, missing: str) -> None:
    signals = replace(golden_signals(), seeds=None)
    with pytest.raises(ValueError, match=missing):
        objective.token_weights(signals, Objective(name="egrsd", gate=gate))


@pytest.mark.parametrize("name", ["grpo", "rlsd", "position"])
def test_an_objective_without_a_gate_has_no_controls(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' has no gate"):
        Objective(name=name, gate="shuffled")
    with pytest.raises(ValueError, match=f"'{name}' has no gate"):
        Objective(name=name, entropy="student")


@pytest.mark.parametrize(("step", "lam"), [(0, 0.5), (10, 0.4), (49, 0.01), (50, 0.0), (80, 0.0)])
def test_rlsd_lam_falls_linearly(step: int, lam: float) -> None:
    signals = replace(golden_signals(), step=step)
    weights = weights_of(signals, Objective(name="rlsd", rlsd_lam=0.5, rlsd_decay_steps=50))
    assert float(weights[0, 1]) == pytest.approx(0.8 * ((1 - lam) + lam * 1.2))


def test_position_weight_counts_within_the_trace() -> None:
    mask = torch.tensor([[True] * 4, [False, False, True, True]])
    weight = objective.position_weight(mask, 0.25, 0.30, 0.10)

    def expected(place: float) -> float:
        return 0.25 + 0.75 / (1 + float(torch.tensor(-(place - 0.30) / 0.10).exp()))

    assert weight[0].tolist() == pytest.approx([expected(p) for p in (0.125, 0.375, 0.625, 0.875)])
    assert weight[1, 2:].tolist() == pytest.approx([expected(0.25), expected(0.75)])
    assert (objective.position_weight(mask, 1.0, 0.3, 0.1) == 1).all()


def test_a_token_that_the_teacher_rules_out_stays_finite() -> None:
    ones = torch.ones(1, 1)
    signals = objective.Signals(torch.ones(1), -500 * ones, -ones, ones, ones.bool(), 1.0)
    assert float(weights_of(signals, Objective(gamma=0.0))) == pytest.approx(0.8)
    up = replace(signals, advantage=-torch.ones(1))  # exp overflows, the clip holds
    assert float(weights_of(up, Objective(gamma=0.0))) == pytest.approx(-1.2)


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantage": torch.ones(3)}, "advantage: shape"),
        ({"advantage": torch.tensor([0.8, float("nan")])}, "advantage: .* NaN"),
        ({"teacher_logprobs": torch.ones(2, 1)}, r"teacher_logprobs: shape \(2, 1\)"),  # would broadcast
        ({"student_logprobs": torch.ones(2, 6, dtype=torch.bfloat16)}, "student_logprobs: torch.bfloat16"),
        ({"teacher_entropy": torch.full((2, 6), float("inf"))}, "teacher_entropy: .* infinite"),
        ({"mask": torch.ones(2, 6)}, "mask: torch.float32"),
        ({"normaliser": 0.0}, "normaliser: 0.0"),
        ({"normaliser": float("nan")}, "normaliser: nan"),
        ({"seeds": torch.ones(2)}, "seeds: torch.float32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_signals_name_what_does_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(golden_signals(), **change)


def test_functions_refuse_what_would_broadcast() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="entropy: shape"):
        objective.lookahead_min(torch.ones(1, 3), mask, 1)
    with pytest.raises(ValueError, match="window: -1"):
        objective.lookahead_min(torch.ones(2, 3), mask, -1)
    with pytest.raises(ValueError, match="direction: shape"):
        objective.magnitude(torch.ones(2, 3), torch.ones(2, 3), torch.ones(1), 0.2)
    with pytest.raises(ValueError, match="logprobs: shape"):
        objective.loss(torch.ones(2, 1), torch.ones(2, 3), mask)
    with pytest.raises(ValueError, match="weights: shape"):
        objective.loss(torch.ones(2, 3), torch.ones(1, 3), mask)
    with pytest.raises(ValueError, match="no token"):
        objective.loss(torch.ones(2, 3), torch.ones(2, 3), ~mask)
    with pytest.raises(ValueError, match="no objective 'ppo'"):
        objective.token_weights(golden_signals(), Objective.model_construct(name="ppo"))


def test_shift_left_beyond_the_end_is_all_fill() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0]])
    assert objective.shift_left(values, 1, -1.0).tolist() == [[2.0, 3.0, -1.0]]
    assert objective.shift_left(values, 5, -1.0).tolist() == [[-1.0] * 3]
