"""Other labels of stored traces: figures against plain Python, points together against points alone, deciles."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Label, Profile
from pipeline.contract import Regime
from pipeline.method import regimes, relabel
from pipeline.method.relabel import Point, StoredSignals


def point(window=3, normaliser="log_vocab", tau_low=0.01, tau_high=0.17, **label):
    """A point of label settings; what is not named is as by default."""
    return Point(Profile(window=window, normaliser=normaliser, tau_low=tau_low, tau_high=tau_high), Label(**label))


POINTS = [point(window=w, gamma=g) for g in (0.0, 0.3, 1.0) for w in (0, 1, 3)]


def drawn(num_rows: int = 60, seed: int = 0) -> StoredSignals:
    """Random signals of three rounds; a fifth of the traces has no advantage."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 30, num_rows))])
    size = int(offsets[-1])
    entropy = (rng.gamma(0.4, 0.8, size) * (rng.random(size) < 0.6)).astype(np.float32)
    teacher = -rng.exponential(0.5, size).astype(np.float32)
    student = teacher + rng.normal(0, 0.2, size).astype(np.float32)
    advantage = (rng.normal(size=num_rows) * (rng.random(num_rows) < 0.8)).astype(np.float32)
    rounds = np.array([0, num_rows // 3, num_rows // 2, num_rows])
    peaks = np.array([entropy[offsets[a] : offsets[b]].max() for a, b in pairwise(rounds)], np.float64)
    return StoredSignals(entropy, teacher, student, offsets, advantage, rounds, peaks, 500)


def by_hand(signals: StoredSignals, point: Point) -> list[dict[str, float]]:
    """Every token at one point, in Python numbers."""
    rows, profile, label = [], point.profile, point.label
    for row, (begin, end) in enumerate(zip(signals.offsets, signals.offsets[1:], strict=False)):
        k = int(np.searchsorted(signals.rounds, row, side="right")) - 1
        m = max(signals.peaks[k], label.min_normaliser)
        scale = math.log(signals.vocab_size) if profile.normaliser == "log_vocab" else m
        sign = np.sign(signals.advantage[row])
        for t in range(begin, end):
            now, ahead = float(signals.entropy[t]), float(min(signals.entropy[t : min(t + profile.window + 1, end)]))
            delta = float(signals.teacher_logprobs[t]) - float(signals.student_logprobs[t])
            regime = Regime.MID
            if now / scale <= profile.tau_low:
                regime = Regime.LOCK
            elif now / scale >= profile.tau_high and ahead / scale >= profile.tau_high:
                regime = Regime.FORK
            elif now / scale >= profile.tau_high and ahead / scale <= profile.tau_low:
                regime = Regime.PIVOT
            gates = [min(max(1 - label.gamma * h / m, label.floor), 1.0) for h in (now, ahead)]
            gate = gates[1] if label.lookahead else gates[0]
            magnitude = min(max(math.exp(sign * delta), 1 - label.epsilon), 1 + label.epsilon)
            rows.append(
                {"regime": regime, "gate": gate, "restored": gates[1] - gates[0], "factor": magnitude * gate, "delta": abs(delta)}
                | {"advantage": abs(float(signals.advantage[row])), "magnitude": magnitude}
            )
    return rows


@pytest.mark.parametrize(
    "at",
    [
        point(),
        point(window=0, gamma=0.0),
        point(window=5, gamma=3.0, floor=0.2, epsilon=0.05),
        point(window=2, normaliser="batch_max", tau_low=0.05, tau_high=0.4, min_normaliser=2.0),
        point(window=4, gamma=1.0, lookahead=False),
    ],
)
def test_figures_are_what_plain_python_makes_of_every_token(at):
    signals = drawn()
    found, rows = relabel.sweep(signals, [at])[at], by_hand(signals, at)
    live = [row for row in rows if row["advantage"]]
    for code in range(4):
        mine, with_signal = ([r for r in part if r["regime"] == code] for part in (rows, live))
        assert found.shares[code] == pytest.approx(len(mine) / len(rows))
        for name, part, values in (("gates", mine, "gate"), ("restored", mine, "restored"), ("factors", with_signal, "factor")):
            expected = np.mean([r[values] for r in part]) if part else np.nan
            assert getattr(found, name)[code] == pytest.approx(expected, abs=1e-6, nan_ok=True)
    weights = [r["advantage"] * r["factor"] for r in live]
    assert found.kept == pytest.approx(sum(weights) / sum(r["advantage"] * r["magnitude"] for r in live), rel=1e-5)
    assert found.effective_tokens == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights), rel=1e-5)
    assert found.effective_share == pytest.approx(found.effective_tokens / len(live), rel=1e-6)
    expected = np.corrcoef([r["factor"] for r in live], [r["delta"] for r in live])[0, 1]
    assert found.correlation == pytest.approx(expected, abs=1e-4)


def test_many_points_at_once_are_each_point_alone_in_the_order_asked_for():
    signals, points = drawn(), [POINTS[4], *POINTS]
    together = relabel.sweep(signals, points)
    assert list(together) == list(dict.fromkeys(points))
    for at in POINTS:
        alone = vars(relabel.sweep(signals, [at])[at])
        for name, value in vars(together[at]).items():
            np.testing.assert_array_equal(value, alone[name], err_msg=f"{name} of {at}")


def test_gamma_zero_keeps_everything_and_restores_nothing():
    found = relabel.sweep(drawn(), [point(gamma=0.0)])[point(gamma=0.0)]
    assert found.kept == pytest.approx(1)
    assert np.nanmax(np.abs(found.restored)) == 0
    assert np.nanmin(found.gates) == 1


@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 2.0]), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_deciles_are_ordered_and_equal_values_share_one(values):
    array = np.array(values, np.float32)
    found = relabel.decile(array)
    order = np.argsort(array, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    assert all(len(set(found[array == value].tolist())) == 1 for value in set(values))
    assert found.min() >= 0
    assert found.max() < relabel.NUM_DECILES


def test_deciles_of_distinct_values_are_equal_in_size():
    assert np.bincount(relabel.decile(np.random.default_rng(0).permutation(1000).astype(np.float32))).tolist() == [100] * 10


def test_chosen_rows_weigh_what_they_weigh_among_all():
    signals, rows = drawn(), np.array([0, 3, 7])
    for at, whole, part in zip(
        POINTS,
        relabel.token_weights(signals, POINTS),
        relabel.token_weights(relabel.select(signals, 1, rows), POINTS),
        strict=True,
    ):
        places = [slice(*signals.offsets[row : row + 2]) for row in rows + signals.rounds[1]]
        assert np.array_equal(part, np.concatenate([whole[place] for place in places])), at


def test_no_trace_at_all_gives_no_number():
    none = np.zeros(0, np.float32)
    signals = StoredSignals(none, none, none, np.zeros(1, np.int64), none, np.array([0, 0]), np.zeros(1), 50)
    found = relabel.sweep(signals, [point()])[point()]
    assert math.isnan(found.kept)
    assert np.isnan(found.restored).all()


def test_a_point_without_its_gate_weighs_by_magnitude_alone():
    signals = drawn()
    (weights,) = relabel.token_weights(signals, [point(gamma=1.0, floor=0.0).ungated()])
    factor = regimes.magnitude(signals.teacher_logprobs, signals.student_logprobs, signals.offsets, signals.advantage, 0.2)
    assert np.array_equal(weights, np.repeat(signals.advantage, np.diff(signals.offsets)) * factor)
