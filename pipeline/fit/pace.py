"""Tokens per second and hours that a recipe may take on known cards: estimates from data sheets, none of them measured.

Generation is bound by memory: each step reads the weights, and the keys and values of its traces. Scoring and training are bound
by arithmetic. A forward pass takes 2 FLOP per parameter and token. The gradient of the inputs takes as much, and so does a
forward pass that checkpointing repeats. The base is frozen, so gradients of its weights are not computed.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from pipeline.config import Pool, Run
from pipeline.fit.footprint import Size
from pipeline.fit.machine import Facts, Line
from pipeline.fit.one_card import moved, shares_a_card

# GB/s of memory and TFLOP/s of bf16 products without sparsity, by torch's name (NVIDIA's data sheets and architecture papers).
CARDS = {
    "NVIDIA B200": (8000, 2250),
    "NVIDIA H200": (4800, 989),
    "NVIDIA H200 NVL": (4800, 835),
    "NVIDIA H100 80GB HBM3": (3350, 989),
    "NVIDIA H100 NVL": (3900, 835),
    "NVIDIA H100 PCIe": (2000, 756),
    "NVIDIA A100-SXM4-80GB": (2039, 312),
    "NVIDIA A100-SXM4-40GB": (1555, 312),
    "NVIDIA A100 80GB PCIe": (1935, 312),
    "NVIDIA A100-PCIE-40GB": (1555, 312),
    "NVIDIA L40S": (864, 362),
    "NVIDIA L4": (300, 121),
    "NVIDIA A10": (600, 125),
    "NVIDIA RTX 6000 Ada Generation": (960, 364),
    "NVIDIA RTX A6000": (768, 155),
    "NVIDIA GeForce RTX 4090": (1008, 165),
    "NVIDIA GeForce RTX 3090": (936, 71),
}
HOST_RATE = 20e9  # bytes/s between a card and the machine's memory; assumed (PCIe 4.0 x16 can do 32 GB/s)
BANDWIDTH_SHARE, SCORE_SHARE, TRAIN_SHARE = 0.6, 0.4, 0.35  # of a card's rates that are used; assumed
MEASURED = {"demo": "2 min 4 s", "smollm2": "2 min 14 s"}  # whole recipes as they ship (tests/benchmarks/RESULTS.md)
TOPIC = "pace (estimate)"
WAITS = "OMP_WAIT_POLICY"  # the environment variable that says how threads of torch wait


def threads(run: Run, facts: Facts) -> list[Line]:
    """A warning where an engine or a rank has more threads than CPUs are free. Nothing elsewhere, or where they sleep anyway.

    A thread of torch that waits spins for milliseconds, on the core that the others need. Two threads on two cores, one of which
    was busy, took 100 times as long a step (2026-11-30).
    """
    pool, train = run.engines.rollout, run.train
    asked = {
        "engines.rollout.threads": 0 if pool.placement.gpus else pool.threads or int(pool.placement.cpus),
        "train.threads": 0 if train.placement.gpus else train.threads or int(train.placement.cpus),
    }
    free = max(1, round(facts.cpus - facts.load))
    if os.environ.get(WAITS, "").upper() == "PASSIVE" or all(count <= free for count in asked.values()):
        return []
    name, count = max(asked.items(), key=lambda item: item[1])
    what = f"{name} is {count}, and the load of {facts.load:.1f} leaves {free} of {facts.cpus} CPUs free"
    remedy = f"Threads that spin may be slow: set it to {free}, end other processes, or set {WAITS}=PASSIVE in the environment"
    return [Line("warning", "threads", f"{what}. {remedy}")]


@dataclass(frozen=True)
class Decode:
    """Steps of one engine that writes `batch` traces at once: bytes read and seconds of a step."""

    batch: int
    read: float
    seconds: float


def estimate(run: Run, size: Size, facts: Facts) -> list[Line]:
    """Lines with tokens per second and hours of a run, or one line that says why there is no figure.

    Every trace is taken to be as long as allowed, so the hours are those of the slowest run.
    """
    if why := _unknown(run, facts):
        return [Line("ok", TOPIC, f"none: {why}")]
    name = min(facts.cards, key=lambda card: CARDS[card])
    card = (CARDS[name][0] * 1e9, CARDS[name][1] * 1e12)
    pool, memory = run.engines.rollout, min(facts.gpus)
    new, traces = run.rollout.max_new_tokens, run.rollout.prompts_per_round * run.rollout.group_size
    step = decode(run, size, card, memory, (_each(traces, pool), new))
    score, train = score_rate(run.engines.score or pool, size, card), train_rate(run, size, card)
    passes = 6 if run.train.gradient_checkpointing else 4
    return [
        Line(
            "ok",
            TOPIC,
            f"{name}: {CARDS[name][0]} GB/s and {CARDS[name][1]} TFLOP/s in bf16 by its data sheet; assumed to be used: "
            f"{BANDWIDTH_SHARE:.0%} of the first, {SCORE_SHARE:.0%} of the second in scoring, {TRAIN_SHARE:.0%} in training",
        ),
        Line("ok", "generation", f"{_step_said(step, new)} = {step.batch / step.seconds:,.0f} tokens/s an engine"),
        Line("ok", "scoring", f"2 x {size.parameters / 1e9:.2f} GFLOP a token = {score:,.0f} tokens/s an engine"),
        Line("ok", "training", f"{passes} x {size.parameters / 1e9:.2f} GFLOP a token = {train:,.0f} tokens/s a rank"),
        _hours(run, size, card, memory),
    ]


def decode(run: Run, size: Size, card: tuple[float, float], memory: int, work: tuple[int, int]) -> Decode:
    """How an engine writes `work` = (traces, new tokens of each) on a `card` of (bytes/s, FLOP/s) and `memory` bytes.

    Half of the new tokens stand in the cache on average, behind a prompt of `prompt_tokens`.
    """
    pool, width = run.engines.rollout, 4 if run.model.dtype == "float32" else 2
    traces, new = work
    prompt = prompt_tokens(run, new)
    weights = size.parameters * width / pool.tensor_parallel
    trace = size.kv_per_token * width / pool.tensor_parallel  # bytes of a token
    room = int((pool.memory_share * memory - weights) // (trace * (prompt + new)))
    batch = max(1, min(traces, pool.max_num_seqs, room))
    read = weights + batch * (prompt + new / 2) * trace
    arithmetic = 2 * size.parameters * batch / (pool.tensor_parallel * card[1] * SCORE_SHARE)
    return Decode(batch, read, max(read / (card[0] * BANDWIDTH_SHARE), arithmetic))


def score_rate(pool: Pool, size: Size, card: tuple[float, float]) -> float:
    """Tokens per second that one engine scores on cards of (bytes/s, FLOP/s)."""
    return pool.tensor_parallel * card[1] * SCORE_SHARE / (2 * size.parameters)


def train_rate(run: Run, size: Size, card: tuple[float, float]) -> float:
    """Tokens per second of one rank, prompt and response, on a card of (bytes/s, FLOP/s)."""
    return card[1] * TRAIN_SHARE / ((6 if run.train.gradient_checkpointing else 4) * size.parameters)


def prompt_tokens(run: Run, new: int) -> int:
    """Tokens that a prompt is taken to have: as many as a response of `new` tokens may have, or what the window leaves."""
    return max(1, min(new, run.model.max_model_len - new))


def _hours(run: Run, size: Size, card: tuple[float, float], memory: int) -> Line:
    """The line about the whole run: seconds of a round by part, of the two evaluations, and the sum in hours."""

    def written(traces: int, new: int) -> float:
        """Seconds in which the engines write so many traces of `new` tokens."""
        each = _each(traces, run.engines.rollout)
        step = decode(run, size, card, memory, (each, new))
        return math.ceil(each / step.batch) * new * step.seconds

    new, traces = run.rollout.max_new_tokens, run.rollout.prompts_per_round * run.rollout.group_size
    most = traces + run.rollout.fill_groups * run.rollout.group_size  # traces that are written and scored; fewer are trained on
    tokens = prompt_tokens(run, new) + new
    scorer = run.engines.score or run.engines.rollout
    scored = _each(most, scorer) * tokens * (1 + run.score.rescore_share) / score_rate(scorer, size, card)
    trained = traces * tokens / (run.train.workers * train_rate(run, size, card))
    parts = {"rollout": written(most, new), "scoring": scored, "training": trained}
    if shares_a_card(run):
        parts["sleep and wake"] = moved(run, size) / HOST_RATE
    held_out = run.evaluation.problems * run.evaluation.samples
    evaluations = 2 * written(held_out, run.evaluation.max_new_tokens) if held_out else 0.0
    total = run.rounds * sum(parts.values()) + evaluations
    said = " + ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    return Line(
        "ok",
        "hours",
        f"{run.rounds} rounds x ({said}) s + evaluations {evaluations:.0f} s = {total / 3600:.1f} h, if every trace has its full "
        "length; starts, verdicts and files come on top",
    )


def _step_said(step: Decode, new: int) -> str:
    read, milliseconds = step.read / 1e9, step.seconds * 1e3
    return f"{step.batch} traces of up to {new} tokens at once, {read:.2f} GB a step, {milliseconds:.2f} ms"


def _each(traces: int, pool: Pool) -> int:
    """Traces of one engine of a pool."""
    return math.ceil(traces / max(1, pool.min))


def _unknown(run: Run, facts: Facts) -> str:
    """Why there is no estimate; "" when there is one."""
    if run.engines.rollout.placement.gpus <= 0 or run.train.placement.gpus <= 0:
        known = MEASURED.get(run.name)
        measured = f". As it ships, this recipe took {known} on two cores with AVX-512 (measured)" if known else ""
        return f"no rates are stated for what runs on a CPU{measured}"
    if not facts.cards:
        return "no GPU here. Run this with --address on the cluster"
    if strange := [card for card in facts.cards if card not in CARDS]:
        return f"the rates of {strange[0]} are not known here; `make gpu-check` measures them"
    return "" if run.model.dtype != "float32" else "the rates of cards are those of bf16, and model.dtype is float32"
