"""The golden vector with its arithmetic: every number of egrsd.json from the formulas of 2605.13255, in plain Python.

`python tests/golden/arithmetic.py` prints each step, to be checked by hand. Two traces (six and four tokens), epsilon 0.2,
floor 0.1.
"""

from __future__ import annotations

import json
from math import exp
from pathlib import Path
from typing import Any

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("egrsd.json").read_text())
EPSILON, FLOOR = 0.2, 0.1


def magnitudes() -> list[list[float]]:
    """Eq. 2. First token of trace 1: exp(+1 * (-.10 + .15)) = 1.0513; of trace 2: exp(-1 * (-2.5 + 2.0)) = 1.6487, cut at 1.2."""
    rows = zip(GOLDEN["advantage"], GOLDEN["teacher_logprobs"], GOLDEN["student_logprobs"], strict=True)
    return [
        [min(max(exp((1 if a > 0 else -1) * (t - s)), 1 - EPSILON), 1 + EPSILON) for t, s in zip(teacher, student, strict=True)]
        for a, teacher, student in rows
    ]


def gates(gamma: float, window: int) -> list[list[float]]:
    """Eq. 8, 5, 6: M = 3.0 of the raw entropies whatever the window; gamma .3, W 3, first token: 1 - .3 * .05 / 3 = .995."""
    peak = max(1.0, *(max(row) for row in GOLDEN["entropy"]))
    return [
        [min(max(1 - gamma * min(row[t : t + window + 1]) / peak, FLOOR), 1.0) for t in range(len(row))]
        for row in GOLDEN["entropy"]
    ]


def loss(gamma: float, window: int) -> float:
    """Eq. 7 at the student's stored log-probs: minus the mean of A w omega log p over all ten tokens."""
    signals = zip(GOLDEN["advantage"], magnitudes(), gates(gamma, window), GOLDEN["student_logprobs"], strict=True)
    terms = [a * w * g * p for a, ws, gs, ps in signals for w, g, p in zip(ws, gs, ps, strict=True)]
    return -sum(terms) / len(terms)


if __name__ == "__main__":
    print("w", magnitudes())
    for case in GOLDEN["cases"]:
        gamma, window = case["gamma"], case["window"]
        print("gamma", gamma, "W", window, "omega", gates(gamma, window), "loss", round(loss(gamma, window), 6))
