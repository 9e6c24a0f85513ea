"""`egrsd sweep` on synthetic signals, one core: the paper's grid of 20 points over a million tokens."""

from __future__ import annotations

import time

import numpy as np

from pipeline.config import Label, Profile
from pipeline.method.relabel import Point, StoredSignals, sweep
from tests.benchmarks.bench_labels import traces

GRID = [Point(Profile(window=window), Label(gamma=gamma)) for gamma in (0.0, 0.1, 0.3, 1.0) for window in (0, 1, 3, 5, 7)]


def measure(num_rows: int = 2500, repeats: int = 3) -> dict[str, float]:
    """Tokens per second through the whole grid (best of `repeats`), the same by point, and seconds for a million tokens."""
    data = traces(num_rows)
    rounds = np.linspace(0, num_rows, 5).astype(np.int64)
    signals = StoredSignals(**vars(data), rounds=rounds, peaks=np.full(4, 4.0), vocab_size=151_936)
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        sweep(signals, GRID)
        best = min(best, time.process_time() - start)
    speed = len(data.entropy) / best
    return {"tokens_per_second": speed, "tokens_per_second_and_point": speed * len(GRID), "seconds_per_million": 1e6 / speed}


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name:28s} {value:,.2f}")
