"""Does the gate help once training has left its warm-up? MAP.md says what was fixed before this ran.

python -m tests.benchmarks.bench_longer --out runs/longer [--only 0]    # trains the worlds that map/ lacks
python -m tests.benchmarks.bench_longer                                 # concludes from map/
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from jobs import compare
from pipeline.evidence.intervals import holm, over_seeds
from pipeline.overrides import resolve
from pipeline.problems.worlds import World
from pipeline.recipes import demo
from tests import trainer_here
from tests.benchmarks import bench_map

WORLDS = (World(2, 0, 3, 0.5), World(4, 3, 3, 0.5))
OBJECTIVES = ("rlsd", "egrsd")
ROUNDS, SEEDS = 16, range(8, 16)  # the map had 6 rounds and the seeds 0 to 7


def settings(world: World, model: str) -> list[str]:
    """The `--set` lines of a world's runs."""
    return [*bench_map.settings(world, model), f"rounds={ROUNDS}"]


def make(out: Path, place: int, results: Path = bench_map.RESULTS) -> None:
    """Warm-start the reasoner of a world, train its runs, and keep their answers in `results`. What is there is left alone."""
    world, kept = WORLDS[place], results / f"longer-{place}.json"
    model, folder = out / f"model-{place}", out / f"world-{place}"
    if kept.exists():
        return
    if not (model / "warmstart.json").exists():
        warm = ["--steps", str(bench_map.STEPS), "--threads", "1", "--world", bench_map.dials(world)]
        bench_map.run(["pipeline.models.warmstart", "--out", str(model), *warm])
    asked = settings(world, str(model))
    with trainer_here.instead_of_ray_train():
        seeds = f"{SEEDS[0]}..{SEEDS[-1]}"
        compare.compare(str(folder), compare.Options("demo", ",".join(OBJECTIVES), seeds, None, asked, None), None, debug=True)
    base = resolve(demo(), asked)
    answers = {name: [bench_map.packed(row) for row in bench_map.accuracy(folder, base, name, SEEDS)] for name in OBJECTIVES}
    kept.write_text(json.dumps({"world": vars(world), "answers": answers}, indent=1) + "\n")


def conclude(results: Path = bench_map.RESULTS) -> list[dict[str, object]]:
    """Of each world: accuracy of both objectives in %, and `egrsd` less `rlsd` in points, with p after Holm's correction."""
    found, tested = [], []
    for place, world in enumerate(WORLDS):
        one = json.loads((results / f"longer-{place}.json").read_text())
        if World(**one["world"]) != world:
            raise ValueError(f"a file of {results} is of another world: {one['world']}")
        answers = {name: np.array([bench_map.unpacked(row) for row in one["answers"][name]]) for name in OBJECTIVES}
        tested.append(over_seeds(answers["egrsd"] - answers["rlsd"]))
        found.append({"world": bench_map.dials(world), **{name: 100 * float(right.mean()) for name, right in answers.items()}})
    raised = holm([1.0 if one.p is None else one.p for one in tested])
    for row, one, p in zip(found, tested, raised, strict=True):
        row["points"] = [100 * value for value in (one.value, one.low, one.high)]
        row["p_holm"] = p
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", type=int, choices=range(len(WORLDS)))
    asked = parser.parse_args()
    if asked.out is None:
        print(json.dumps(conclude(), indent=1))
        return
    for place in range(len(WORLDS)):
        if asked.only in (None, place):
            make(asked.out, place)


if __name__ == "__main__":
    main()
