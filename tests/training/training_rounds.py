"""Rounds and runs that the training tests share. Also imported by the processes they spawn."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.config import Run, resolve
from pipeline.training.batches import Round

TINY = Run(name="test", seed=3)


def tiny_run(*overrides: str) -> Run:
    """The tiny reasoner, four traces a step, an adapter of rank 4 that moves visibly in a few steps."""
    settings = (
        "model.lora_rank=4",
        "train.batch_traces=6",
        "train.micro_batch_tokens=96",
        "train.learning_rate=0.01",
        "rounds=2",
    )
    return resolve(TINY, [*settings, *overrides])


def make_round(number: int = 0, num_traces: int = 12, seed: int = 0, **columns: list) -> Round:
    """A committed round with ragged prompts, responses and signals; `columns` replace what was drawn."""
    rng = np.random.default_rng([seed, number])
    prompts = [rng.integers(4, 57, rng.integers(3, 12)).tolist() for _ in range(num_traces)]
    responses = [rng.integers(4, 57, rng.integers(1, 30)).tolist() for _ in range(num_traces)]
    student = [(-rng.exponential(0.5, len(r))).tolist() for r in responses]
    drawn = {
        "trace_id": [f"r{number}-{i}" for i in range(num_traces)],
        "prompt_tokens": prompts,
        "response_tokens": responses,
        "student_logprobs": student,
        "teacher_logprobs": [(np.array(s) + rng.normal(0, 0.2, len(s))).clip(max=0).tolist() for s in student],
        "teacher_entropy": [rng.exponential(0.7, len(r)).tolist() for r in responses],
        "advantage": rng.normal(0, 1, num_traces).tolist(),
        "policy_version": [number] * num_traces,
        "reject_reason": [None] * num_traces,
        **columns,
    }
    ids, floats = pa.list_(pa.int32()), pa.list_(pa.float32())
    types = {"prompt_tokens": ids, "response_tokens": ids, "advantage": pa.float32(), "policy_version": pa.int32()}
    types |= {name: floats for name in ("student_logprobs", "teacher_logprobs", "teacher_entropy")}
    table = pa.table({name: pa.array(values, types.get(name, pa.string())) for name, values in drawn.items()})
    return Round(number, number, table)
