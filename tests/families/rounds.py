"""Two rounds of a tiny model of each family: engine, stages, trainer and published adapters, in one process without Ray.

    python tests/families/rounds.py FOLDER NAME ...

It prints a line of JSON for each family: the mean and the largest gap of every round, or the error in one line.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from in_process import bring_up_to_date

from actors.inference.engine import Engine
from families.models import FAMILIES, WHOLE, make
from pipeline.errors import EgrsdError
from pipeline.models import fitness
from pipeline.models.layers import with_targets
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.recipes import demo
from pipeline.rounds.inventory import commit_round
from pipeline.rounds.round import plan_round, with_engines
from pipeline.stages import MEASURE, STAGES
from pipeline.store.directory import Store
from pipeline.training import rank
from pipeline.training.agreement import base_model

TRAINERS: list[Any] = []  # the trainer and its run, in the process that trains
SETS = (
    "rounds=2",
    "rollout.prompts_per_round=2",
    "rollout.prompts_per_shard=2",
    "rollout.max_new_tokens=24",
    "evaluation.problems=0",
    "train.learning_rate=0.02",
    "train.warmup_steps=0",
    "score.fallback=false",
    "score.base_logprobs=true",
    "objective.name=opd",  # random models are never right, so an objective of advantages would move nothing
)


def resume(uri: str) -> None:
    """Make the trainer of a run, in the process that trains."""
    store = Store(uri)
    TRAINERS[:] = [(store, rank.resume(store, store.load_run(), torch.device("cpu")))]
    rank.tell_base(TRAINERS[0][1], store)


def train(number: int) -> bool:
    """Train a committed round, in the process that trains."""
    [(store, trainer)] = TRAINERS
    return rank.train_round(trainer, store, number)


def rounds(folder: Path, trainer: Executor, *sets: str) -> dict[str, Any]:
    """Train two rounds of the model in `folder`. Returns the gaps of both in nats, and what is trained.

    The trainer has a process of its own, as in a run: vLLM changes classes of transformers in its process.
    """
    run = with_targets(resolve(demo(), [*SETS, f"model.path={folder}", *sets]))
    notes = fitness.check(run, for_gpus=False)
    store, source = Store(f"{folder}/run"), open_source(run.source)
    store.save_run(run, {})
    trainer.submit(resume, store.uri).result()
    engine = Engine(run.model, run.engines.rollout, run.score)
    try:
        base_model.compare(store, run, {"rollout": engine}, lambda: None)
        for number in range(run.rounds):
            work = with_engines(plan_round(store, run, "rounds", number, number, source), {"rollout": engine, "score": engine})
            for name in MEASURE:
                for shard, indices in work.shards.items():
                    bring_up_to_date(work, STAGES[name], shard, source.rows(indices) if name == "prompts" else None)
            commit_round(work)
            assert trainer.submit(train, number).result()
    finally:
        engine.close()
    steps = [row for row in store.metrics() if "logprob_gap" in row]
    return {
        "mean": [row["logprob_gap"] for row in steps],
        "largest": [row["logprob_gap_max"] for row in steps],
        "moved": _moved(store),
        "entropies": engine.facts().entropy_method,
        "targets": list(run.model.lora_targets) if run.model.tuning == "lora" else ["all weights (model.tuning=full)"],
        "notes": notes,
    }


def _moved(store: Store) -> float:
    """Mean |log-prob under policy 1 - log-prob under the base| in nats, over the traces of round 1."""
    entries = store.entries("rounds/0001", "score").values()
    pairs = [store.read(entry, ["student_logprobs", "base_logprobs"]) for entry in entries]
    gaps = [np.abs(np.subtract(a, b)) for pair in pairs for a, b in zip(*(c.to_pylist() for c in pair.columns), strict=True) if a]
    return float(np.concatenate(gaps).mean())


def main(parent: str, *names: str) -> None:
    """Measure each family in turn, and go on after one that fails."""
    trainer = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    sets = [name for name in names if "=" in name]
    for name in [name for name in names if name in FAMILIES]:
        begun = time.perf_counter()
        folder = Path(tempfile.mkdtemp(dir=parent))
        try:
            make(name, folder)
            found = rounds(folder, trainer, *(["model.tuning=full"] if name in WHOLE else []), *sets)
        except EgrsdError as error:
            found = {"refused": str(error).removeprefix(f"{folder}: ")}
        except Exception as error:  # the next family must still be measured
            traceback.print_exc()
            found = {"broken": f"{type(error).__name__}: {error}"}
        print(json.dumps({"family": name, "seconds": round(time.perf_counter() - begun, 1), **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
