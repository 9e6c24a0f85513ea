"""What it saves that the traces of a prompt share it in an engine: `python -m tests.benchmarks.bench_shared_prompt [pairs]`.

Eight prompts with eight traces each, beside 64 prompts of the same lengths that differ in their first token. One engine answers
both in turns, and a ratio is that of a pair. `first` writes the first token of every trace. `scoring` scores responses of 50
tokens after prompts of twice the length. The model is that of bench_packing.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time

import numpy as np

from actors.inference.engine import Engine
from pipeline import config
from pipeline.contract import Generate, Policy, Sampling, Sequence
from pipeline.models.warmstart import build_tokenizer
from tests.benchmarks.bench_packing import save_model

PROMPTS, GROUP, LENGTH, RESPONSE = 8, 8, 100, 50


def rows(length: int, shared: bool) -> list[list[int]]:
    """The prompts of all traces: of a group the same, or another first token in each."""
    draw = np.random.default_rng(0)
    bodies = draw.integers(3, 50, (PROMPTS, length - 1)).tolist()
    return [[3 + (0 if shared else trace), *body] for body in bodies for trace in range(GROUP)]


def measure(pairs: int = 5) -> dict[str, float]:
    """Ratios of time, prompts that differ / prompts that are shared: median, least and most."""
    found: dict[str, float] = {}
    base, one = Policy(0), Sampling(1.0, 1.0, 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        build_tokenizer().save_pretrained(folder)
        engine = Engine(config.Model(path=folder, max_model_len=512), config.Pool(threads=1), config.ScoreSettings())
        works = {
            "first": lambda shared: engine.generate([Generate(p, i) for i, p in enumerate(rows(LENGTH, shared))], base, one),
            "scoring": lambda shared: engine.score([Sequence(p, p[1 : 1 + RESPONSE]) for p in rows(2 * LENGTH, shared)], base),
        }
        for name, work in works.items():
            ratios = []
            for pair in range(pairs + 1):
                begun = time.perf_counter()
                work(False)
                middle = time.perf_counter()
                work(True)
                if pair:  # the first one warms up
                    ratios.append((middle - begun) / (time.perf_counter() - middle))
            found |= {name: float(np.median(ratios)), f"{name}_least": min(ratios), f"{name}_most": max(ratios)}
        engine.close()
    return found


if __name__ == "__main__":
    print(json.dumps(measure(int((sys.argv[1:] or ["5"])[0])), indent=1))
