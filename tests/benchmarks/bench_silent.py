"""A training step that knows silent traces against one that learns from them: `python -m tests.benchmarks.bench_silent [pairs]`.

Both steps are the same Trainer on the same packed minibatch: four prompts with eight traces each, of which one group has an
advantage. Times are processor seconds of one thread, of steps in turn; a ratio is that of a pair. `compared` is the first step of
a round, in which the silent traces are read, and `later` any other. The model is that of bench_packing.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch

from pipeline.config import Run
from pipeline.overrides import resolve
from pipeline.training import batches
from pipeline.training.step import Trainer
from pipeline.training.student import student
from tests.benchmarks.bench_packing import CPU, Shape, save_model, traces_of

SHAPE, LOUD = Shape(4, 8, 100, 50, 150), 1  # one of four groups has an advantage


def measure(pairs: int = 3) -> dict[str, float]:
    """Ratios of time, learning from all / knowing silent traces: median, least and most, of both kinds of step."""
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        settings = [f"model.path={folder}", "train.dtype=bfloat16", "train.logprob_gap=1e9", "train.logprob_gap_max=1e9"]
        run = resolve(Run(name="bench"), [*settings, "train.batch_traces=64", "train.micro_batch_tokens=2048"])
        made, traces = Trainer(run, student.build(run, CPU), CPU), traces_of(SHAPE)
        advantage = np.where(np.arange(len(traces.advantage)) < LOUD * SHAPE.group, traces.advantage, 0).astype(np.float32)
        share = made._share(replace(traces, advantage=advantage), np.arange(len(advantage)))
        everything = batches.share(
            replace(traces, advantage=advantage), np.arange(len(advantage)), 0, 1, 2048, made.student.packs
        )
        for name, policy in (("compared", 0), ("later", None)):
            ratios = []
            for pair in range(pairs + 1):
                begun = time.process_time()
                made.train_step(everything, "benchmark", policy)
                middle = time.process_time()
                made.train_step(share, "benchmark", policy)
                if pair:  # the first one warms up
                    ratios.append((middle - begun) / (time.process_time() - middle))
            found |= {name: float(np.median(ratios)), f"{name}_least": min(ratios), f"{name}_most": max(ratios)}
    return found


if __name__ == "__main__":
    print(json.dumps(measure(int((sys.argv[1:] or ["5"])[0])), indent=1))
