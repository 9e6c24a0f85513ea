"""A whole round of this project beside a GRPO step of TRL: same model, LoRA, prompts, traces and threads, in turns.

    make peers                                                       # TRL's environment, once
    python -m tests.benchmarks.peers.bench_grpo [--recipe demo|smollm2] [--turns 5] [--rounds 6] [--set NAME=VALUE ...]

The round has a teacher, a verifier and Parquet, and ends with a published policy. TRL's step has no teacher and stores nothing.
It generates with transformers, its default on a CPU. Its vLLM is not taken: TRL 1.16 supports vLLM 0.22 to 0.31, this is 0.32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.config import Run
from pipeline.models.resolve import resolve_model
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.overrides import resolve
from pipeline.recipes import recipe
from pipeline.store.directory import Store, area

ROOT = Path(__file__).parents[3]
PEER = ROOT / ".peers/bin/python"
LEFT_OUT, THREADS = 2, 2
MICRO_BATCH = {"demo": 256, "smollm2": 16}  # traces of one backward pass of TRL; more of SmolLM2 do not fit beside their logits


def settings(turn: int, rounds: int, sets: list[str]) -> list[str]:
    """The `--set` lines of our rounds: another seed in each turn, no evaluation, two threads or what `sets` says of them."""
    asked = {line.split("=", 1)[0] for line in sets}
    threads = [f"{name}={THREADS}" for name in ("engines.rollout.threads", "train.threads") if name not in asked]
    return [f"rounds={rounds}", "evaluation.problems=0", f"seed={turn}", *threads, *sets]


def ours(name: str, folder: Path, lines: list[str]) -> list[float]:
    """Seconds of our rounds, from the first prompt to the published policy; the first rounds are left out."""
    sets = [part for text in lines for part in ("--set", text)]
    command = [sys.executable, "-m", "jobs", "distill", "--recipe", name, "--run", str(folder), *sets]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    rows = [row for row in Store(str(folder)).metrics() if row["writer"] == "round" and row["round"] >= LEFT_OUT]
    return [row["seconds_round"] for row in rows]


def wanted(run: Run, name: str, folder: Path) -> dict[str, Any]:
    """What TRL is asked for: the prompts of our first round as texts, and their tokens as we send them."""
    store = Store(str(folder))
    every = [row for entry in store.entries(area("rounds", 0), "prompts").values() for row in store.read(entry).to_pylist()]
    rows = [row for row in every if row["reject_reason"] is None]
    tokens = [row["prompt_tokens"] for row in rows]
    return {
        "model": resolve_model(run.model.path),
        "dtype": run.model.dtype,
        "prompts": tokenizer_of(run.model).batch_decode(tokens),
        "prompt_tokens": tokens,
        "answers": [row["answer"] for row in rows],
        "group": run.rollout.group_size,
        "max_new_tokens": run.rollout.max_new_tokens,
        "sampling": {"temperature": run.rollout.temperature, "top_p": run.rollout.top_p, "top_k": run.rollout.top_k},
        "learning_rate": run.train.learning_rate,
        "targets": list(run.model.lora_targets),
        "micro_batch": MICRO_BATCH[name],
        "threads": THREADS,
        "steps": run.rounds,
        "out": str(folder / "trl"),
    }


def theirs(asked: dict[str, Any], folder: Path) -> tuple[list[float], float]:
    """Seconds of TRL's steps without the first ones, and the mean length of its completions."""
    file = folder / "wanted.json"
    file.write_text(json.dumps(asked))
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    command = [str(PEER), str(ROOT / "tests/benchmarks/peers/grpo_step.py"), str(file)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    told = json.loads(done.stdout.splitlines()[-1])
    return told["seconds"][LEFT_OUT:], told["length"]


def measure(name: str = "demo", turns: int = 5, each: int = 6, sets: list[str] | None = None) -> dict[str, float]:
    """Medians over all steps, and their ratio: how many times quicker our round is. `each` rounds a turn."""
    rounds: list[float] = []
    steps: list[float] = []
    lengths: list[float] = []
    for turn in range(turns):
        with tempfile.TemporaryDirectory() as folder:
            lines = settings(turn, each, sets or [])
            run = resolve(recipe(name), lines)
            rounds += ours(name, Path(folder), lines)
            seconds, length = theirs(wanted(run, name, Path(folder)), Path(folder))
            steps += seconds
            lengths.append(length)
            print(f"turn {turn}: {rounds[-len(seconds) :]} beside {seconds}", file=sys.stderr, flush=True)
    return {
        "round_s": median(rounds),
        "least_round_s": min(rounds),
        "trl_step_s": median(steps),
        "least_trl_step_s": min(steps),
        "trl_length": sum(lengths) / len(lengths),
        "times_quicker": median(steps) / median(rounds),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo", choices=MICRO_BATCH)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--set", action="append", default=[], dest="sets")
    told = parser.parse_args()
    for key, value in measure(told.recipe, told.turns, told.rounds, told.sets).items():
        print(f"{key:<20} {value:8.3f}")
