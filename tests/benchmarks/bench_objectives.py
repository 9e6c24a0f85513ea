"""Nine objectives with and without the gate: gradients on stored traces, then training over five seeds.

    python -m tests.benchmarks.bench_objectives --out runs/objectives [--seeds 0..4] [--set NAME=VALUE ...]

It runs `egrsd compare`, then `egrsd sweep` over the first objective's run. Every finished run is left alone, so the same command
goes on after an interruption. 45 runs of the demo take about an hour and a half on two quiet cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

OBJECTIVES = "grpo,rlsd,egrsd,cl_egrsd,opd,opd+entropy,fkl,fkl+entropy,eopd"
NEEDS = ["score.keep_topk=16"]  # what the distributional objectives read
AXES = ["objective.name=grpo,rlsd,egrsd,cl_egrsd,opd,fkl,eopd", "objective.gate=own,off,entropy"]


def commands(out: str, seeds: str, sets: list[str]) -> list[list[str]]:
    """The two commands, without the interpreter."""
    chosen = [part for text in [*NEEDS, *sets] for part in ("--set", text)]
    axes = [part for text in AXES for part in ("--set", text)]
    compare = ["jobs", "compare", "--recipe", "demo", "--objectives", OBJECTIVES, "--seeds", seeds, "--out", out, *chosen]
    return [compare, ["jobs", "sweep", "--run", f"{out}/grpo-s{seeds.partition('.')[0]}", *axes]]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", default="0..4")
    parser.add_argument("--set", action="append", default=[])
    asked = parser.parse_args()
    for command in commands(asked.out, asked.seeds, asked.set):
        print("+", *command, flush=True)
        subprocess.run([sys.executable, "-m", *command], check=True)


if __name__ == "__main__":
    main()
