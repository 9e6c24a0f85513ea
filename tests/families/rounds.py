"""Two rounds of a tiny model of each family: engine, stages, trainer and published adapters, in one process without Ray.

    python tests/families/rounds.py FOLDER NAME ...

It prints a line of JSON for each family: the mean and the largest gap of every round, or the error in one line.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from in_process import bring_up_to_date

from actors.inference.engine import Engine
from families.models import FAMILIES, make
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

SETS = (
    "rounds=2",
    "rollout.prompts_per_round=2",
    "rollout.prompts_per_shard=2",
    "rollout.max_new_tokens=24",
    "evaluation.problems=0",
    "train.learning_rate=0.02",
    "train.warmup_steps=0",
    "score.fallback=false",
)


def rounds(folder: Path, *sets: str) -> dict[str, Any]:
    """Train two rounds of the model in `folder`. Returns the gaps of both in nats, and what is trained."""
    run = with_targets(resolve(demo(), [*SETS, f"model.path={folder}", *sets]))
    notes = fitness.check(run, on_gpu=False)
    store, device = Store(f"{folder}/run"), torch.device("cpu")
    store.save_run(run, {})
    trainer, source = rank.resume(store, run, device), open_source(run.source)
    engine = Engine(run.model, run.engines.rollout, run.score)
    try:
        for number in range(run.rounds):
            work = with_engines(plan_round(store, run, "rounds", number, number, source), {"rollout": engine, "score": engine})
            for name in MEASURE:
                for shard, indices in work.shards.items():
                    bring_up_to_date(work, STAGES[name], shard, source.rows(indices) if name == "prompts" else None)
            commit_round(work)
            assert rank.train_round(trainer, store, number)
    finally:
        engine.close()
    steps = [row for row in store.metrics() if "logprob_gap" in row]
    return {
        "mean": [row["logprob_gap"] for row in steps],
        "largest": [row["logprob_gap_max"] for row in steps],
        "delta": [row["delta"] for row in steps],
        "entropies": engine.facts().entropy_method,
        "targets": list(run.model.lora_targets),
        "notes": notes,
    }


def main(parent: str, *names: str) -> None:
    """Measure each family in turn, and go on after one that fails."""
    sets = [name for name in names if "=" in name]
    for name in [name for name in names if name in FAMILIES]:
        begun = time.perf_counter()
        folder = Path(tempfile.mkdtemp(dir=parent))
        try:
            make(name, folder)
            found = rounds(folder, *sets)
        except EgrsdError as error:
            found = {"refused": str(error)}
        except Exception as error:  # the next family must still be measured
            found = {"broken": f"{type(error).__name__}: {error}"}
        print(json.dumps({"family": name, "seconds": round(time.perf_counter() - begun, 1), **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
