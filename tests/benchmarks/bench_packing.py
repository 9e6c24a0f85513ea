"""A packed training step against a padded one: time, and padding, on prompts that groups of traces share.

`python -m tests.benchmarks.bench_packing [repetitions] [folder of SmolLM2]`. Both steps are the same Trainer on the same
minibatch and differ in `train.packing` alone. Times are processor seconds of one thread, of steps in turn. The ratio is that of
each pair: the median over the repetitions, with the least and the largest. Without a folder the model has the width and the
vocabulary of SmolLM2-135M, a fifth of its layers and random weights, in bfloat16.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import Run
from pipeline.overrides import resolve
from pipeline.training import batches
from pipeline.training.batches import RoundTable, Traces
from pipeline.training.step import Trainer
from pipeline.training.student import student

VOCAB = 49_152
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """A minibatch: prompts, traces of each, mean tokens of a prompt, and least and most tokens of a response."""

    prompts: int
    group: int
    prompt: int
    least: int
    most: int


SHAPES = {
    "word_problems": Shape(2, 8, 100, 50, 150),  # as SmolLM2 on grade-school word problems
    "long_prompts": Shape(1, 8, 400, 50, 150),
    "short_prompts": Shape(2, 8, 16, 50, 150),
    "alone": Shape(6, 1, 50, 50, 800),
}


def measure(repeats: int = 3, model: str = "") -> dict[str, float]:
    """Ratios of time, padded / packed, and the padded share of both, by shape of the minibatch."""
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        if not model:
            save_model(folder)
        settings = [f"model.path={model or folder}", "rounds=1", "train.dtype=bfloat16", "train.micro_batch_tokens=2048"]
        run = resolve(Run(name="bench"), settings)
        made = Trainer(run, student.build(run, CPU), CPU)
        for name, shape in SHAPES.items():
            ratios, shares = compared(made, traces_of(shape), repeats)
            found |= {f"{name}_speedup": float(np.median(ratios)), f"{name}_least": min(ratios), f"{name}_most": max(ratios)}
            found |= {f"{name}_padded_before": shares["padded"], f"{name}_padded_packed": shares["packed"]}
    return found


def save_model(folder: str) -> None:
    """A random Llama of SmolLM2's width and vocabulary, of 6 layers, tied embeddings."""
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": VOCAB}
    config = LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def traces_of(shape: Shape) -> Traces:
    """Random traces of a shape."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for place in range(shape.prompts):
        prompt = rng.integers(0, VOCAB, round(shape.prompt * rng.uniform(0.8, 1.2))).tolist()
        for number in range(shape.group):
            length = int(rng.integers(shape.least, shape.most + 1))
            signals = {name: (-rng.exponential(0.5, length)).tolist() for name in ("teacher_logprobs", "student_logprobs")}
            signals["teacher_entropy"] = rng.exponential(0.5, length).tolist()
            tokens = {"prompt_tokens": prompt, "response_tokens": rng.integers(0, VOCAB, length).tolist()}
            row = {"trace_id": f"{place}-{number}", "advantage": 1.0, "policy_version": 0, "reject_reason": None}
            rows.append(row | tokens | signals)
    return batches.usable(RoundTable(0, 0, pa.Table.from_pylist(rows)), 0)


def compared(made: Trainer, traces: Traces, repeats: int) -> tuple[list[float], dict[str, float]]:
    """Ratios of processor seconds, padded / packed, of pairs of steps; and the padded share of each kind."""
    rows, budget = np.arange(len(traces.trace_ids)), made.run.train.micro_batch_tokens
    shares = {kind: batches.share(traces, rows, 0, 1, budget, kind == "packed") for kind in ("padded", "packed")}
    seconds: dict[str, list[float]] = {kind: [] for kind in shares}
    padded = {}
    for repeat in range(repeats + 1):
        for kind, share in shares.items():
            begun = time.process_time()
            padded[kind] = made.train_step(share, "benchmark")["padded_share"]
            if repeat:  # the first one warms up
                seconds[kind].append(time.process_time() - begun)
    return [a / b for a, b in zip(seconds["padded"], seconds["packed"], strict=True)], padded


if __name__ == "__main__":
    print(json.dumps(measure(int((sys.argv[1:] or ["5"])[0]), (sys.argv[2:] or [""])[0]), indent=1))
