"""The training step against the same step with full logits, and with K targets, at a vocabulary of 49 152: memory and speed.

`python -m tests.benchmarks.bench_step`. Ratios within one run. The model has SmolLM2-135M's width and vocabulary and fewer
layers, random weights; both steps are the same Trainer on the same minibatch and differ in the head alone. Memory is the most
that tensors made by the step take at one time, by torch's own allocation record (the resident set depends on what the
allocator gives back). Times are the least processor seconds of interleaved repetitions: other work on the machine counts less
in them. Without gradient checkpointing, which favours full logits: the activations of the layers count on both sides. The third
step learns from the teacher's 32 most likely tokens (`fkl`), with the chunked head too.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import profiler
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import Objective, Run
from pipeline.contract import TOPK
from pipeline.method.objective import weighted_sum
from pipeline.overrides import resolve
from pipeline.training import batches
from pipeline.training.batches import MicroBatch
from pipeline.training.step import Trainer
from pipeline.training.student import student

VOCAB, HIDDEN, LAYERS = 49_152, 576, 6
TRACES, PROMPT, RESPONSE = 16, 16, 112
TOP = 32
REPEATS = 3


def measure() -> dict[str, float]:
    """Peak MiB and seconds of the steps, and their ratios.

    The aim: memory_ratio <= 0.5 at speed_ratio >= 0.9, and with K targets 1.15 times the memory and 1.3 times the time at most.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        run = resolve(Run(name="bench"), [f"model.path={folder}", "rounds=1"])
        steps = {name: (trainer(run, full=name == "full"), minibatch()) for name in ("full", "chunked")}
        topk = resolve(run, ["objective.name=fkl", f"score.keep_topk={TOP}"])
        steps["topk"] = trainer(topk), minibatch(constants=topk.objective)
        seconds = times(steps)
        mib = {name: peak_mib(*step, Path(folder, "trace.json")) for name, step in steps.items()}
    return {
        "full_mib": mib["full"],
        "chunked_mib": mib["chunked"],
        "memory_ratio": mib["chunked"] / mib["full"],
        "full_s": seconds["full"],
        "chunked_s": seconds["chunked"],
        "speed_ratio": seconds["full"] / seconds["chunked"],
        "topk_mib": mib["topk"],
        "topk_s": seconds["topk"],
        "topk_memory_ratio": mib["topk"] / mib["chunked"],
        "topk_time_ratio": seconds["topk"] / seconds["chunked"],
    }


def save_model(folder: str) -> None:
    """A random Llama of SmolLM2's width and vocabulary, tied embeddings."""
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN, "intermediate_size": 1536, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    config = LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)


def trainer(run: Run, full: bool = False, device: str = "cpu") -> Trainer:
    """A Trainer of a run on one device, with the chunked head or with full logits."""
    place = torch.device(device)
    built = student.build(run, place)
    if full:
        built.__class__ = FullLogits
    return Trainer(run, built, place)


class FullLogits(student.Student):
    """The usual way: float32 logits of every position, log-softmax, gather."""

    def forward(self, tokens, sources, terms, layout=None):
        """As `Student.forward`, of coefficients alone."""
        logits = self.model(input_ids=tokens, use_cache=False).logits.float()
        logprobs = logits.flatten(0, 1).log_softmax(-1)[sources, terms.targets]
        return weighted_sum(logprobs, terms.coefficients), logprobs.detach()


def minibatch(
    traces: int = TRACES,
    prompt: int = PROMPT,
    response: int = RESPONSE,
    vocab: int = VOCAB,
    constants: Objective | None = None,
) -> list[MicroBatch]:
    """One micro-batch of `traces` random traces of `prompt` and `response` tokens each, with the columns of an objective."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "trace_id": str(i),
            "prompt_tokens": rng.integers(0, vocab, prompt).tolist(),
            "response_tokens": rng.integers(0, vocab, response).tolist(),
            "teacher_logprobs": (-rng.exponential(0.5, response)).tolist(),
            "student_logprobs": (-rng.exponential(0.5, response)).tolist(),
            "teacher_entropy": rng.exponential(0.5, response).tolist(),
            "advantage": float(rng.normal()),
            "policy_version": 0,
            "reject_reason": None,
        }
        for i in range(traces)
    ]
    if constants is not None and constants.is_distributional:
        for row in rows:
            row |= dict(zip(TOPK, most_likely(rng, response, vocab), strict=True))
    usable = batches.usable(batches.RoundTable(0, 0, pa.Table.from_pylist(rows)), 0, constants)
    return batches.share(usable, np.arange(traces), 0, 1, budget=traces * (prompt + response))


def most_likely(rng: np.random.Generator, response: int, vocab: int) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and log-probs of TOP random tokens at each position."""
    ids = [rng.choice(vocab, TOP, replace=False).tolist() for _ in range(response)]
    shares = -np.sort(-rng.dirichlet(np.ones(TOP + 1), response)[:, :TOP], axis=1)
    return ids, np.log(shares).tolist()


def peak_mib(made: Any, batch: Any, trace: Path) -> float:
    """Most MiB that tensors of one step take at one time, beyond weights and optimiser state."""
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        made.train_step(batch, "benchmark")
    recorded.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]") / 2**20


def times(steps: dict[str, tuple[Any, Any]]) -> dict[str, float]:
    """Least seconds of a step, both kinds in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(REPEATS + 1):
        for name, (made, batch) in steps.items():
            begun = time.process_time()
            made.train_step(batch, "benchmark")
            if repeat:  # the first one warms up
                seconds[name].append(time.process_time() - begun)
    return {name: min(found) for name, found in seconds.items()}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
