"""What overlapping rounds gain (`max_staleness` 1 against 0), with a fake engine that sleeps and real training.

Expected: one after the other a round lasts measure + rest (training, hand over); overlapped, the longer of measure + label and
rest.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from actors.fakes import UNWATCHED

ROUNDS, LEFT_OUT, BATCH_S = 8, 2, 1.2
DRIVER = """
import sys
from functools import partial
from actors.fakes import Behaviour, FakeEngine
from jobs import distill
from jobs.settle import Choices
engine = partial(FakeEngine, behaviour=Behaviour(batch_s=float(sys.argv[2])))
distill.distill(sys.argv[1], Choices("demo", sys.argv[3:]), engine_class=engine)
"""
SETS = [
    *UNWATCHED,
    f"rounds={ROUNDS}",
    "rollout.group_size=16",
    "grade.advantage=running",
    "train.batch_traces=128",
    "evaluation.problems=0",
]


def measure() -> dict[str, float]:
    """Seconds of a mean round both ways, the speed-up that its parts let expect, and the share of it that was reached."""
    apart, together = _rounds(0), _rounds(1)
    rest = apart["round"] - apart["measure"]
    expected = apart["round"] / max(apart["measure"] + apart["label"], rest)
    reached = apart["period"] / together["period"]
    return {
        "measure_s": apart["measure"],
        "train_s": rest,
        "round_s_staleness_0": apart["period"],
        "round_s_staleness_1": together["period"],
        "speedup": reached,
        "speedup_expected": expected,
        "speedup_share": reached / expected,
    }


def _rounds(staleness: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        settings = [*SETS, f"max_staleness={staleness}"]
        command = [sys.executable, "-c", DRIVER, f"{folder}/run", str(BATCH_S), *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2])
        from pipeline.store.directory import Store

        store = Store(f"{folder}/run")
        rows = [row for row in store.metrics() if row["writer"] == "round" and row["round"] >= LEFT_OUT]
        assert store.local_root is not None
        published = [(store.local_root / f"policy/{n:04d}/manifest.json").stat().st_mtime for n in (LEFT_OUT, ROUNDS)]
    seconds = {name: mean(row[f"seconds_{name}"] for row in rows) for name in ("round", "measure", "label")}
    return seconds | {"period": (published[1] - published[0]) / (ROUNDS - LEFT_OUT)}


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name:<28} {value:8.3f}")
