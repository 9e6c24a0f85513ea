"""Ragged arithmetic against plain Python, row by row and token by token, and against the torch twins."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import bench_labels
from golden import arithmetic
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Label, Objective, Profile
from pipeline.contract import Regime, Scope
from pipeline.method import objective, ragged, regimes
from pipeline.method.regimes import RaggedSignals

PROFILE = Profile(normaliser="batch_max", window=3)  # entropies are divided by the round's largest
SCOPE = Scope(peak=2.0, vocab_size=500)


def layout(rows: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    flat = np.array([value for row in rows for value in row], np.float32)
    return flat, np.cumsum([0, *map(len, rows)], dtype=np.int64)


def split(values: np.ndarray, offsets: np.ndarray) -> list[list[Any]]:
    return [values[a:b].tolist() for a, b in pairwise(offsets.tolist())]


# Values on a grid that holds both thresholds (0.02 and 0.34 nats), so that ties and equalities happen.
entropies = st.sampled_from([0.0, 0.01, 0.02, 0.03, 0.2, 0.34, 0.35, 1.0, 2.5]).map(lambda x: float(np.float32(x)))
ragged_rows = st.lists(st.lists(entropies, max_size=9), max_size=7)


@given(ragged_rows, st.integers(0, 12))
@settings(max_examples=120, deadline=None)
def test_lookahead_is_the_minimum_of_its_window(rows: list[list[float]], window: int) -> None:
    values, offsets = layout(rows)
    before = values.copy()
    lowest = regimes.lookahead_min(values, offsets, window)
    assert split(lowest, offsets) == [[min(row[t : t + window + 1]) for t in range(len(row))] for row in rows]
    assert (lowest <= values).all()
    assert (regimes.lookahead_min(values, offsets, window + 1) <= lowest).all()
    assert np.array_equal(values, before)
    assert (regimes.lookahead_min(np.full_like(values, 2.5), offsets, window) == 2.5).all()


@given(ragged_rows.filter(any), st.integers(0, 12), st.data())
@settings(max_examples=50, deadline=None)
def test_rows_are_blind_to_their_neighbours(rows: list[list[float]], window: int, data: st.DataObject) -> None:
    kept = data.draw(st.sampled_from([r for r, row in enumerate(rows) if row]))
    changed = [row if r == kept else [9.0] * (len(row) + 2) for r, row in enumerate(rows)]
    for one, other in zip(everything(rows, window)[kept], everything(changed, window)[kept], strict=True):
        assert one == other


def looking(window: int) -> Profile:
    return PROFILE.model_copy(update={"window": window})


def everything(rows: list[list[float]], window: int) -> list[tuple[Any, ...]]:
    """Per row: all that profile and label say of it."""
    values, offsets = layout(rows)
    profile = regimes.profile(values, offsets, 2.0, looking(window))
    signals = RaggedSignals(values, np.sin(values * 9), values, offsets, offsets[1:] * 0 - 1)
    labels = regimes.label(signals, profile.lookahead, SCOPE, PROFILE, Label())
    flat = [split(column, offsets) for column in (profile.lookahead, labels.regime, labels.gate, labels.weight)]
    spans = zip(*(split(column, labels.spans.offsets) for column in labels.spans[:-1]), strict=True)
    return list(zip(*flat, profile.shares.tolist(), *(s.tolist() for s in profile.statistics), spans, strict=True))


@given(ragged_rows)
@settings(max_examples=80, deadline=None)
def test_row_statistics_are_those_of_numpy(rows: list[list[float]]) -> None:
    values, offsets = layout(rows)
    found = regimes.row_statistics(values, offsets)
    expected = [
        [np.mean(row), np.quantile(row, 0.5), np.quantile(row, 0.9), np.max(row)] if row else [np.nan] * 4 for row in rows
    ]
    np.testing.assert_allclose(np.stack(found, 1), np.array(expected).reshape(-1, 4), rtol=1e-6)


def test_rounding_below_zero_counts_as_zero() -> None:
    values = np.array([-1e-8, 0.5, -0.0], np.float32)
    found = regimes.row_statistics(values, np.array([0, 3]))
    assert (float(found.p50[0]), float(found.maximum[0])) == (0.0, 0.5)
    assert regimes.spans(np.zeros(3, np.int8), values, np.array([0, 3])).peak_entropy.tolist() == [0.5]


def regime(now: float, lowest: float, low: float, high: float) -> int:
    """Section 5.5, word for word."""
    if now <= low:
        return Regime.LOCK
    if now >= high and lowest >= high:
        return Regime.FORK
    if now >= high and lowest <= low:
        return Regime.PIVOT
    return Regime.MID


@given(ragged_rows, st.integers(0, 5), st.booleans())
@settings(max_examples=80, deadline=None)
def test_regimes_spans_and_shares(rows: list[list[float]], window: int, per_row: bool) -> None:
    values, offsets = layout(rows)
    scales = np.array([2.0 + (r % 2) * per_row for r in range(len(rows))], np.float32)
    lowest = regimes.lookahead_min(values, offsets, window)
    codes = regimes.regimes(values, lowest, offsets, scales if per_row else 2.0, PROFILE)
    assert codes.dtype == np.int8
    limits = [(float(np.float32(0.01) * scale), float(np.float32(0.17) * scale)) for scale in scales]
    expected = [
        [regime(h, low, *limit) for h, low in zip(row, lows, strict=True)]
        for row, lows, limit in zip(rows, split(lowest, offsets), limits, strict=True)
    ]
    assert split(codes, offsets) == expected
    shares = regimes.regime_shares(codes, offsets)
    assert shares.shape == (len(rows), 4)
    for row, share in zip(expected, shares, strict=True):
        np.testing.assert_allclose(share, [row.count(c) / len(row) if row else np.nan for c in range(4)], rtol=1e-6)
    found = regimes.spans(codes, values, offsets)
    assert [end for row in split(found.offsets, np.array([0, len(found.offsets)])) for end in row][-1] == len(found.start)
    fields = [split(column, found.offsets) for column in found[:-1]]
    for r, row in enumerate(expected):
        check_spans(rows[r], row, list(zip(*(field[r] for field in fields), strict=True)))


def check_spans(entropy: list[float], codes: list[int], spans: list[tuple[int, int, int, float, float]]) -> None:
    """Spans tile the row, each is uniform, no two neighbours agree, and their figures are of their own tokens."""
    assert [s for s, *_ in spans] == [0, *(e for _, e, *_ in spans)][: len(spans)]
    assert (spans[-1][1] if spans else 0) == len(codes)
    assert all(before[2] != after[2] for before, after in pairwise(spans))
    for start, end, code, mean, peak in spans:
        assert set(codes[start:end]) == {code}
        assert mean == pytest.approx(np.mean(entropy[start:end]), rel=1e-6)
        assert peak == max(entropy[start:end])


def test_the_four_regimes_by_hand() -> None:
    # h / 2: lock .005; pivot .5 with a lock ahead; fork .5 with .5 ahead to the end; mid .05; mid: high now, mid ahead
    values, offsets = layout([[0.01, 1.0, 0.01], [1.0, 1.0], [0.1], [1.0, 0.1]])
    lowest = regimes.lookahead_min(values, offsets, 1)
    codes = regimes.regimes(values, lowest, offsets, 2.0, PROFILE)
    assert split(codes, offsets) == [[Regime.LOCK, Regime.PIVOT, Regime.LOCK], [Regime.FORK, Regime.FORK], [Regime.MID], [1, 1]]


def test_entropies_are_divided_by_the_vocabularys_or_by_the_rounds_own_scale() -> None:
    peaks, label = np.array([0.5, 4.0]), Label(min_normaliser=1.5)
    assert regimes.threshold_scale(peaks, 500, Profile(normaliser="log_vocab"), label) == pytest.approx(np.log(500))
    assert regimes.threshold_scale(peaks, 500, PROFILE, label).tolist() == [1.5, 4.0]


# ---- torch twins: Eq. 2, 5, 6, 7 and 8, each once in torch and once in numpy


@st.composite
def constants_of_the_weight(draw: st.DrawFn) -> dict[str, Any]:
    """Every constant of a token weight at random; values that decide something by being exact come often."""
    return {
        "gamma": draw(st.sampled_from([0.0, 0.3, 1.0]) | st.floats(0, 5)),
        "floor": draw(st.sampled_from([0.0, 0.1, 1.0]) | st.floats(0, 1)),
        "epsilon": draw(st.sampled_from([0.2]) | st.floats(0.01, 0.99)),
        "min_normaliser": draw(st.sampled_from([1.0]) | st.floats(0.05, 10)),
    }


@given(ragged_rows.filter(any), st.integers(0, 6), constants_of_the_weight(), st.integers(0, 2**31))
@settings(max_examples=120, deadline=None)
def test_numpy_and_torch_compute_the_same_weights(
    rows: list[list[float]], window: int, constants: dict[str, Any], seed: int
) -> None:
    values, offsets = layout(rows)
    rng = np.random.default_rng(seed)
    teacher, student = -rng.exponential(1, (2, len(values))).astype(np.float32)
    advantage = np.round(rng.normal(size=len(rows))).astype(np.float32)  # zeros among them
    mask = torch.arange(max(map(len, rows))) < torch.tensor(np.diff(offsets))[:, None]

    def padded(column: np.ndarray) -> torch.Tensor:
        return torch.full(mask.shape, torch.nan).masked_scatter(mask, torch.tensor(column))

    rounding = {"rtol": 2e-6, "atol": 5e-7 * (1 + constants["gamma"])}  # float32, of 1 - gamma h where that is near 0
    largest = objective.normaliser(padded(values), mask, Objective(**constants))
    assert float(largest) == np.float32(regimes.normaliser(values.max(), Label(**constants)))
    lookahead = regimes.lookahead_min(values, offsets, window)
    assert lookahead.tolist() == objective.lookahead_min(padded(values), mask, window)[mask].tolist()
    w = objective.magnitude(padded(teacher), padded(student), torch.tensor(advantage).sign(), constants["epsilon"])[mask]
    found = regimes.magnitude(teacher, student, offsets, advantage, constants["epsilon"])
    torch.testing.assert_close(torch.tensor(found), w, rtol=2e-6, atol=0)
    padded_signals = (torch.tensor(advantage), padded(teacher), padded(student), padded(values), mask, largest)
    for name, ahead in (("cl_egrsd", True), ("egrsd", False)):
        label, objective_ = Label(lookahead=ahead, **constants), Objective(name=name, window=window, **constants)
        gated = lookahead if ahead else values
        omega = objective.gate(torch.tensor(gated), largest, objective_)
        torch.testing.assert_close(torch.tensor(regimes.gate(gated, float(largest), label)), omega, **rounding)
        ragged_signals = RaggedSignals(values, teacher, student, offsets, advantage)
        labels = regimes.label(ragged_signals, lookahead, Scope(float(values.max()), 500), PROFILE, label)
        torch.testing.assert_close(torch.tensor(labels.gate), omega, **rounding)
        assert ((labels.gate >= np.float32(label.floor)) & (labels.gate <= 1)).all()
        weights = objective.token_weights(objective.Signals(*padded_signals), objective_)[mask]
        torch.testing.assert_close(torch.tensor(labels.weight), weights, rtol=4e-6, atol=4 * rounding["atol"])


@pytest.mark.parametrize("case", arithmetic.GOLDEN["cases"], ids=lambda c: f"gamma{c['gamma']}-W{c['window']}")
def test_golden_vector(case: dict) -> None:
    golden = {name: layout(arithmetic.GOLDEN[name])[0] for name in ("entropy", "teacher_logprobs", "student_logprobs")}
    offsets = layout(arithmetic.GOLDEN["entropy"])[1]
    signals = RaggedSignals(**golden, offsets=offsets, advantage=np.array(arithmetic.GOLDEN["advantage"], np.float32))
    profile = regimes.profile(golden["entropy"], offsets, 3.0, looking(case["window"]))
    scope = Scope(float(profile.statistics.maximum.max()), 500)
    labels = regimes.label(signals, profile.lookahead, scope, PROFILE, Label(gamma=case["gamma"]))
    np.testing.assert_allclose(labels.gate, layout(case["gate"])[0], atol=5e-5)
    assert -(labels.weight * golden["student_logprobs"]).mean() == pytest.approx(case["loss"], abs=1e-6)


# ---- whole stages


def test_stages_equal_the_plain_loop_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bench_labels.traces(40, seed=3)
    monkeypatch.setattr(ragged, "BLOCK_TOKENS", 1000)  # smaller than a few rows, larger than others
    assert len(list(ragged.blocks(data.offsets))) > 8
    profile, labels = bench_labels.vectorised(data)
    spans = [split(column, labels.spans.offsets) for column in labels.spans[:-1]]
    for row, expected in enumerate(bench_labels.loop(data)):
        part = slice(*data.offsets[row : row + 2])
        np.testing.assert_array_equal(profile.lookahead[part], np.float32(expected["lookahead"]))
        np.testing.assert_array_equal(labels.regime[part], expected["regime"])
        np.testing.assert_allclose(labels.gate[part], expected["gate"], rtol=1e-6)
        np.testing.assert_allclose(labels.weight[part], expected["weight"], rtol=1e-5)
        np.testing.assert_allclose(profile.shares[row], expected["shares"], rtol=1e-6)
        statistics = [expected["mean"], *expected["quantiles"], expected["maximum"]]
        np.testing.assert_allclose([s[row] for s in profile.statistics], statistics, rtol=1e-5)
        np.testing.assert_allclose(list(zip(*(s[row] for s in spans), strict=True)), expected["spans"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [0, 3, 0, 0, 1, 0]])
def test_empty_rows_and_no_rows(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "BLOCK_TOKENS", 2)
    values, offsets = layout([[0.5] * n for n in lengths])
    profile = regimes.profile(values, offsets, 2.0, PROFILE)
    advantage = np.where(np.diff(offsets) > 0, 1.0, np.nan)  # a rejected row has no advantage
    labels = regimes.label(RaggedSignals(values, values, values, offsets, advantage), profile.lookahead, SCOPE, PROFILE, Label())
    assert profile.shares.shape == (len(lengths), 4)
    assert np.array_equal(np.isnan(profile.statistics.mean), np.diff(offsets) == 0)
    assert np.array_equal(np.isnan(profile.shares).all(1), np.diff(offsets) == 0)
    assert labels.regime.tolist() == [Regime.FORK] * len(values)
    assert np.diff(labels.spans.offsets).tolist() == [int(n > 0) for n in lengths]
    assert labels.spans.end.tolist() == [n for n in lengths if n]
    assert len(labels.weight) == len(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": np.array([0, 2])}, "entropy: float32"),
        ({"offsets": np.array([0, 3], np.int32)}, "offsets"),
        ({"offsets": np.array([1, 3])}, "offsets"),
        ({"offsets": np.array([0, 4, 3])}, "offsets"),
        ({"entropy": np.ones(3)}, "entropy: float64"),
        ({"student_logprobs": np.array([0, np.nan, 0], np.float32)}, "student_logprobs: NaN"),
        ({"teacher_logprobs": np.array([0, np.inf, -np.inf], np.float32)}, "teacher_logprobs: NaN"),
        ({"advantage": np.array([np.nan])}, "advantage: a row"),
        ({"advantage": np.ones(2)}, "advantage: shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_label_names_the_signal_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    ones = np.ones(3, np.float32)
    good = {"entropy": ones, "teacher_logprobs": ones, "student_logprobs": ones}
    good |= {"offsets": np.array([0, 3]), "advantage": np.ones(1)}
    regimes.label(RaggedSignals(**good), ones, SCOPE, PROFILE, Label())
    with pytest.raises(ValueError, match=message), np.errstate(invalid="ignore"):
        regimes.label(RaggedSignals(**(good | change)), ones, SCOPE, PROFILE, Label())


@pytest.mark.parametrize(
    ("lookahead", "peak", "thresholds", "message"),
    [
        (np.zeros((3, 1), np.float32), 2.0, PROFILE, "lookahead: float32"),
        (np.ones(3, np.float32), np.nan, PROFILE, "normaliser: nan"),
        (np.ones(3, np.float32), 2.0, PROFILE.model_copy(update={"tau_low": 0.5}), "tau_low: 0.5"),
    ],
)
def test_label_names_what_else_does_not_fit(lookahead: np.ndarray, peak: float, thresholds: Profile, message: str) -> None:
    ones = np.ones(3, np.float32)
    signals = RaggedSignals(ones, ones, ones, np.array([0, 3]), np.ones(1))
    with pytest.raises(ValueError, match=message):
        regimes.label(signals, lookahead, Scope(peak, 500), thresholds, Label())


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_named(scale: float) -> None:
    with pytest.raises(ValueError, match=f"scale: {scale}"):
        regimes.profile(np.ones(3, np.float32), np.array([0, 3]), scale, PROFILE)


def test_a_normaliser_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match=r"normaliser: 0\.0"):
        regimes.gate(np.ones(3, np.float32), 0.0, Label())


def test_window_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="window: -1"):
        regimes.profile(np.ones(3, np.float32), np.array([0, 3]), 2.0, looking(-1))


def test_benchmark_measures_both_ways() -> None:
    found = bench_labels.measure(num_rows=200, repeats=1)
    assert found["ratio"] == pytest.approx(found["tokens_per_second"] / found["loop_tokens_per_second"])
    assert found["ratio"] > 5  # the bench itself holds the full promise; this only tells arithmetic from a loop
