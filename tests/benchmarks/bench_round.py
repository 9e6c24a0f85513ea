"""The share of a demo round's wall time that is neither engine nor training work, with its parts. The aim: under 35 %.

Runs the demo recipe for a few rounds on real engines and trainer, in a Ray of its own; the first rounds are left out.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

ROUNDS, LEFT_OUT = 6, 2


def measure() -> dict[str, float]:
    """Seconds of a mean round by what they went into, and the share that is overhead."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--set", f"rounds={ROUNDS}", "--set", "evaluation.problems=0"]
        command = [sys.executable, "-m", "jobs", "distill", "--recipe", "demo", "--run", f"{folder}/run", *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2])
        from pipeline.store.directory import Store

        rows = [row for row in Store(f"{folder}/run").metrics() if row["round"] >= LEFT_OUT]
    rounds = [row for row in rows if row["writer"] == "round"]
    seconds = {name: mean(row[f"seconds_{name}"] for row in rounds) for name in ("round", "measure", "engines", "label")}
    training = sum(row["seconds"] for row in rows if row["writer"] == "train") / len(rounds)
    overhead = seconds["round"] - seconds["engines"] - training
    return {
        "round_s": seconds["round"],
        "engines_s": seconds["engines"],
        "training_s": training,
        "around_engines_s": seconds["measure"] - seconds["engines"],
        "handover_and_checkpoint_s": overhead - (seconds["measure"] - seconds["engines"]),
        "overhead_share": overhead / seconds["round"],
    }


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name:<28} {value:8.3f}")
