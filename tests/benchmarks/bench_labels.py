"""Profile and label arithmetic on one core against a plain per-token Python loop: `python -m tests.benchmarks.bench_labels`."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from pipeline.config import Label, Profile
from pipeline.contract import Scope
from pipeline.method import regimes
from pipeline.method.regimes import RaggedSignals

SCOPE = Scope(peak=4.0, vocab_size=151_936)
PROFILE, LABEL = Profile(window=5), Label()


def traces(num_rows: int, seed: int = 0) -> RaggedSignals:
    """Synthetic signals: half the rows of about 40 tokens, half of 400 to 1000; entropies mostly near 0, as a teacher's are."""
    rng = np.random.default_rng(seed)
    lengths = np.where(np.arange(num_rows) % 2, rng.integers(30, 50, num_rows), rng.integers(400, 1001, num_rows))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    size = int(offsets[-1])
    teacher = -rng.exponential(0.5, size).astype(np.float32)
    return RaggedSignals(
        entropy=(rng.gamma(0.4, 0.8, size) * (rng.random(size) < 0.6)).astype(np.float32),
        offsets=offsets,
        advantage=rng.normal(size=num_rows).astype(np.float32),
        teacher_logprobs=teacher,
        student_logprobs=teacher + rng.normal(0, 0.2, size).astype(np.float32),
    )


def vectorised(data: RaggedSignals) -> tuple[regimes.EntropyProfile, regimes.TokenLabels]:
    """The arithmetic of the profile and the label stage."""
    scale = regimes.threshold_scale(SCOPE.peak, SCOPE.vocab_size, PROFILE, LABEL)
    profile = regimes.profile(data.entropy, data.offsets, scale, PROFILE)
    return profile, regimes.label(data, profile.lookahead, SCOPE, PROFILE, LABEL)


def loop(data: RaggedSignals) -> list[dict[str, Any]]:
    """The same on Python lists, token by token: one dictionary of results per row."""
    columns = {name: values.tolist() for name, values in vars(data).items()}
    low, high = (tau * math.log(SCOPE.vocab_size) for tau in (PROFILE.tau_low, PROFILE.tau_high))
    rows = []
    for row, (begin, end) in enumerate(zip(columns["offsets"], columns["offsets"][1:], strict=False)):
        entropy = columns["entropy"][begin:end]
        signals = columns["teacher_logprobs"][begin:end], columns["student_logprobs"][begin:end]
        found = _profile_row(entropy, low, high)
        rows.append(found | _weights_row(found["lookahead"], *signals, columns["advantage"][row]))
        rows[-1]["spans"] = _spans_row(rows[-1]["regime"], entropy)
    return rows


def measure(num_rows: int = 8000, repeats: int = 7) -> dict[str, float]:
    """tokens_per_second and the loop's, best of `repeats` on one core each, and their ratio."""
    data, few = traces(num_rows), traces(num_rows // 100)
    speed = len(data.entropy) / _best(lambda: vectorised(data), repeats)
    plain = len(few.entropy) / _best(lambda: loop(few), 3)
    return {"tokens_per_second": speed, "loop_tokens_per_second": plain, "ratio": speed / plain}


def _profile_row(entropy: list[float], low: float, high: float) -> dict[str, Any]:
    lookahead, codes, counts = [], [], [0, 0, 0, 0]
    for place, now in enumerate(entropy):
        lowest = min(entropy[place : place + PROFILE.window + 1])
        code = 1
        if now <= low:
            code = 0
        elif now >= high:
            code = 3 if lowest >= high else 2 if lowest <= low else 1
        lookahead.append(lowest)
        codes.append(code)
        counts[code] += 1
    ordered, size = sorted(entropy), len(entropy)
    quantiles = []
    for share in (0.5, 0.9):
        place = share * (size - 1)
        below = int(place)
        quantiles.append(ordered[below] + (ordered[min(below + 1, size - 1)] - ordered[below]) * (place - below))
    shares = [count / size for count in counts]
    statistics = {"mean": sum(entropy) / size, "quantiles": quantiles, "maximum": ordered[-1]}
    return {"lookahead": lookahead, "regime": codes, "shares": shares, **statistics}


def _weights_row(lookahead: list[float], teacher: list[float], student: list[float], advantage: float) -> dict[str, Any]:
    gates, weights = [], []
    slope, floor, epsilon = LABEL.gamma / SCOPE.peak, LABEL.floor, LABEL.epsilon
    direction = (advantage > 0) - (advantage < 0)
    for place, lowest in enumerate(lookahead):
        gate = min(max(1 - slope * lowest, floor), 1.0)
        magnitude = min(max(math.exp(direction * (teacher[place] - student[place])), 1 - epsilon), 1 + epsilon)
        gates.append(gate)
        weights.append(advantage * magnitude * gate)
    return {"gate": gates, "weight": weights}


def _spans_row(codes: list[int], entropy: list[float]) -> list[tuple[int, int, int, float, float]]:
    found, begin = [], 0
    for place in range(1, len(codes) + 1):
        if place == len(codes) or codes[place] != codes[begin]:
            part = entropy[begin:place]
            found.append((begin, place, codes[begin], sum(part) / len(part), max(part)))
            begin = place
    return found


def _best(run: Any, repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()  # CPU time: another process on the machine does not count, a second thread would
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name:24s} {value:,.1f}")
