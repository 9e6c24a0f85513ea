"""The work of `make gpu-check`: what the trainer, the engine and a round of this project do on one GPU, as rows of a table.

Imports that need a package stand inside functions, because a part must run where the packages of another one are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

QWEN3_1_7B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}


class Size(NamedTuple):
    """Amounts of work: traces x (prompt + response) tokens for the engine, tokens of a step and of a trace for the trainer."""

    traces: int
    prompt: int
    response: int
    steps: tuple[int, ...]
    trace: int
    repeats: int


FULL = Size(64, 256, 256, (4096, 16_384), 2048, 3)
TINY = Size(4, 12, 8, (64, 256), 32, 1)


class Row(NamedTuple):
    """One line of the table. `what` was done, the `figure` that came out, and a `remark` that says how to read it."""

    what: str
    figure: str
    remark: str = ""


# ---- the trainer


def trainer_rows(size: Size) -> list[str]:
    """Names of the trainer's rows."""
    return [f"step of {tokens} tokens, {head}" for head in ("chunked head", "full logits") for tokens in size.steps]


def check_trainer(asked: argparse.Namespace, size: Size) -> Iterator[Row]:
    """Tokens per second and peak memory of an optimiser step, with the project's chunked head and with full logits."""
    import torch

    from pipeline.config import Run
    from pipeline.overrides import resolve
    from tests.benchmarks import bench_step

    dtype, device = precision(asked), "cuda" if torch.cuda.is_available() else "cpu"
    sets = [f"model.path={asked.model}", f"model.dtype={dtype}", f"train.dtype={dtype}", "train.gradient_checkpointing=true"]
    trainer = bench_step.trainer(resolve(Run(name="gpu-check"), [*sets, "model.max_model_len=4096"]), device=device)
    vocab, names = trainer.student.vocab_size, iter(trainer_rows(size))
    for kind in (type(trainer.student), bench_step.FullLogits):
        trainer.student.__class__ = kind
        for tokens in size.steps:
            batch = bench_step.minibatch(tokens // size.trace, size.trace // 4, size.trace - size.trace // 4, vocab)
            name = next(names)
            try:
                yield Row(name, *step_figures(trainer, batch, tokens, size.repeats))
            except torch.OutOfMemoryError:
                yield Row(name, "out of memory")
                trainer.optimizer.zero_grad()


def step_figures(trainer: Any, batch: Any, tokens: int, repeats: int) -> tuple[str, str]:
    """Figure and remark of a step: tokens per second of the quickest of `repeats`, and peak memory."""
    import torch

    from tests.benchmarks import bench_step

    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        begun = time.perf_counter()
        trainer.train_step(batch, "gpu-check")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    speed = f"{tokens / min(seconds[1:]):,.0f} tokens/s"
    if not torch.cuda.is_available():
        with tempfile.TemporaryDirectory() as folder:
            return (
                f"{speed}, peak {bench_step.peak_mib(trainer, batch, Path(folder, 'trace.json')):,.0f} MiB",
                "CPU; without weights",
            )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train_step(batch, "gpu-check")
    return f"{speed}, peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB", "prompt and response; with weights and AdamW"


# ---- the engine


def engine_rows(_: Size) -> list[str]:
    """Names of the engine's rows."""
    exact = [f"{what} against transformers, {who}" for who in ("base", "adapter") for what in ("generation", "scoring")]
    speeds = [f"{what}, {how} entropy" for what in ("generation", "scoring") for how in ("with", "without")]
    return ["engine start", "self-check", *speeds, *exact]


def check_engine(asked: argparse.Namespace, size: Size) -> Iterator[Row]:
    """Start of a real engine, its self-check, its speed, and its numbers beside those of transformers and peft."""
    from actors.inference.engine import Engine
    from pipeline import config
    from pipeline.contract import Policy
    from tests.benchmarks.bench_engine import random_adapter

    model = config.Model(path=asked.model, dtype=precision(asked), max_model_len=max(128, 2 * (size.prompt + size.response)))
    policies = {"base": Policy(0), "adapter": Policy(1, random_adapter(str(Path(asked.folder, "adapter")), model, std=0.01))}
    begun = time.perf_counter()
    engine = Engine(model, engine_pool(), config.ScoreSettings())
    yield Row("engine start", f"{time.perf_counter() - begun:.0f} s", "vLLM's imports, compilation and self-check included")
    facts = asdict(engine.facts())
    yield Row("self-check", facts.pop("entropy_method"), ", ".join(f"{name} {value}" for name, value in facts.items()))
    requests, sampling = work_for(engine.facts().vocab_size, size)
    yield from speed_rows(engine, requests, sampling, size)
    answers = {}
    for who, policy in policies.items():
        traces = engine.generate(requests[:4], policy, sampling)
        sequences = [as_sequence(request, trace) for request, trace in zip(requests, traces, strict=False)]
        answers[who] = (sequences, {"generation": traces, "scoring": engine.score(sequences, policy)})
    engine.close()
    yield from exact_rows(answers, model, policies["adapter"].adapter)


def engine_pool() -> Any:
    """A pool's settings for one engine on the card, or for a small one on the CPU."""
    import torch

    from pipeline.config import Placement, Pool

    if not torch.cuda.is_available():
        return Pool(threads=1, kv_cache_gib=0.25)
    return Pool(placement=Placement(gpus=1), memory_share=0.6, enforce_eager=False, max_num_seqs=64)


def work_for(vocab: int, size: Size) -> tuple[list[Any], Any]:
    """Requests with random prompts, and how to sample."""
    import numpy as np

    from pipeline.contract import Generate, Sampling

    prompts = np.random.default_rng(0).integers(0, vocab, (size.traces, size.prompt))
    return [Generate(prompt.tolist(), seed) for seed, prompt in enumerate(prompts)], Sampling(1.0, 1.0, 0, size.response)


def as_sequence(request: Any, trace: Any) -> Any:
    """A trace as a sequence to score."""
    from pipeline.contract import Sequence

    return Sequence(request.prompt, trace.tokens.tolist())


def speed_rows(engine: Any, requests: list[Any], sampling: Any, size: Size) -> Iterator[Row]:
    """Tokens per second of generation and scoring, with log-prob and entropy of every token and without entropy."""
    from pipeline.contract import Policy
    from tests.benchmarks import bench_engine as bench

    traces = engine.generate(requests, Policy(0), sampling)
    sequences = [as_sequence(request, trace) for request, trace in zip(requests, traces, strict=True)]
    works = {
        "generation, with entropy": lambda: bench.generated(engine.generate(requests, Policy(0), sampling)),
        "generation, without entropy": lambda: bench.plain_generation(engine, requests, sampling),
        "scoring, with entropy": lambda: (engine.score(sequences, Policy(0)), bench.scored(sequences))[1],
        "scoring, without entropy": lambda: bench.plain_scoring(engine, sequences),
    }
    remarks = {"generation": "tokens written", "scoring": "prompt and response; without: vLLM's cheapest prompt log-probs"}
    for what, speeds in bench.alternate(works, size.repeats).items():
        about = f"{size.traces} traces of {size.prompt} + {size.response} tokens, base model; "
        yield Row(what, f"{max(speeds):,.0f} tokens/s", about + remarks[what.split(",")[0]])


def exact_rows(answers: dict[str, Any], model: Any, adapter: str) -> Iterator[Row]:
    """The largest distance of log-probs and entropies to a forward pass of transformers and peft, in nats."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from pipeline.models.resolve import open_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = open_model(AutoModelForCausalLM, model, "weights", dtype=getattr(torch, model.dtype)).to(device)
    net = PeftModel.from_pretrained(base, adapter).eval()
    for who, (sequences, found) in answers.items():
        with net.disable_adapter() if who == "base" else contextlib.nullcontext():
            expected = [forward(net, sequence, device) for sequence in sequences]
        for what, numbers in found.items():
            logprob = max(gap(got.logprobs, right) for got, (right, _) in zip(numbers, expected, strict=True))
            entropy = max(gap(got.entropy, right) for got, (_, right) in zip(numbers, expected, strict=True))
            said = f"log-prob {logprob:.1e}, entropy {entropy:.1e} nat at most"
            yield Row(f"{what} against transformers, {who}", said, f"{model.dtype} on both sides, {len(sequences)} traces")


def forward(net: Any, sequence: Any, device: str) -> tuple[Any, Any]:
    """Log-probs and entropies [T] in nats of a response, by the decoder of a peft model and a head in float32."""
    import torch

    from pipeline.method.entropy import entropy_of

    start = len(sequence.prompt) - 1
    tokens = torch.tensor([[*sequence.prompt, *sequence.response]], device=device)
    with torch.no_grad():
        hidden = net.get_base_model().get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0, start:-1]
        head = net.get_base_model().get_output_embeddings().weight
        logprobs = torch.nn.functional.linear(hidden.float(), head.float()).log_softmax(-1)
        return logprobs.gather(1, tokens[0, start + 1 :, None])[:, 0].cpu().numpy(), entropy_of(logprobs).cpu().numpy()


def gap(found: Any, expected: Any) -> float:
    """The largest distance of two arrays."""
    return float(abs(found - expected).max())


# ---- a round


APART, TURNS = "one round, engine on the card, rank on the CPU", "two rounds, engine and rank in turns on one card"


def round_rows(_: Size) -> list[str]:
    """Names of the rows of rounds."""
    return [APART, TURNS]


def check_round(asked: argparse.Namespace, size: Size) -> Iterator[Row]:
    """Rounds of a recipe by `egrsd distill`, as it ships, and with engine and trainer in turns on the card.

    The second round of turns finds an engine that slept, or took the place of one. It is probed before its answers count.
    """
    yield Row(APART, *rounds_done(asked, size, 1, "apart", ()))
    half = ("engines.rollout.placement.gpus=0.5", "train.placement.gpus=0.5", "engines.rollout.memory_share=0.5")
    turns = ("engines.rollout.colocate=true", "train.offload=all", *(() if size is TINY else half))
    yield Row(TURNS, *rounds_done(asked, size, 2, "turns", turns))


def rounds_done(asked: argparse.Namespace, size: Size, count: int, name: str, more: tuple[str, ...]) -> tuple[str, str]:
    """Figure and remark of `count` rounds with the settings `more`. Raises RuntimeError with a failed run's last line."""
    from pipeline.store.directory import Store

    run = str(Path(asked.folder, name))
    sets = [f"rounds={count}", "evaluation.problems=0", *more]
    sets += ["rollout.prompts_per_round=4", "rollout.prompts_per_shard=2"] if size is TINY else []
    command = [sys.executable, "-m", "jobs", "distill", "--recipe", asked.recipe, "--run", run]
    command += [word for text in sets for word in ("--set", text)]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode or Store(run).latest_policy() != count:
        raise RuntimeError(reason(done.stderr) or last_line(done.stdout))
    gaps = [row["logprob_gap"] for row in Store(run).metrics() if "logprob_gap" in row]
    apart = f"; engine and trainer differ by {max(gaps):.1e} nat a token" if gaps else ""
    return f"{seconds:.0f} s", f"recipe {asked.recipe}{apart}; the starts of Ray and the engine included"


# ---- the model


def precision(asked: argparse.Namespace) -> str:
    """The type of the weights: float32 for the tiny model, else bfloat16."""
    return "float32" if asked.tiny else "bfloat16"


def save_model(folder: Path) -> None:
    """A model of the shape of Qwen3-1.7B with random weights. Its logits are spread as wide as those of a trained model."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(Qwen3Config(**QWEN3_1_7B)).to(torch.bfloat16)
    model.model.norm.weight.data.fill_(4.0)
    model.save_pretrained(folder.with_suffix(".part"))
    folder.with_suffix(".part").rename(folder)  # a process that was ended in between leaves no half model
    del model
    torch.cuda.empty_cache()  # the engine measures what is free


def reason(text: str) -> str:
    """The last error that a command told on standard error, where the name of its log comes behind it, or the last line."""
    return last_line("\n".join(line for line in text.splitlines() if line.startswith("error:"))) or last_line(text)


def last_line(text: str) -> str:
    """The last line of a text that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
