"""When does the gate help? The map over nine tiny worlds. MAP.md says what was fixed before anything ran, and what was not.

    python -m tests.benchmarks.bench_map --out runs/map [--only 1,3,5,7]    # trains and audits the worlds that map/ lacks
    python -m tests.benchmarks.bench_map [--worlds 9]                       # concludes from map/
    python -m tests.benchmarks.bench_map --power

A finished world leaves its answers and audits in map/world-0.json, so its runs may go. Every step that is done is left alone, so
the same command goes on after an interruption. Each world is one `egrsd compare`, whose runs share engines. Their trainer is a
thread of that process: Ray Train would start for longer than it trains.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import stats

from jobs import compare
from pipeline.config import Run
from pipeline.evidence.comparison import Key, Series, add_point, chosen_objectives, variant
from pipeline.evidence.intervals import Tested, holm, over_seeds
from pipeline.overrides import resolve
from pipeline.problems.worlds import ANSWER_PATTERN, World
from pipeline.recipes import demo
from pipeline.store.directory import Store
from tests import trainer_here

FORKS, PIVOTS, STYLES = (0, 2, 4), (0, 1, 3), (0.0, 0.5, 1.0)
ORDER = ((0, 0), (2, 2), (1, 1), (2, 0), (0, 2), (1, 2), (2, 1), (1, 0), (0, 1))  # any first part of it spans the dials
WORLDS = [World(FORKS[i], PIVOTS[j], 3, STYLES[(i + j) % 3]) for i, j in ORDER]
OBJECTIVES = "rlsd,grpo,egrsd,cl_egrsd,position,grpo+top_entropy:0.2,inverted,shuffled,no_reference"
AUDITED = {name: name for name in ("rlsd", "grpo", "egrsd", "cl_egrsd", "position", "grpo+top_entropy:0.2")}
AUDITED |= {
    name: f"cl_egrsd+cl_entropy+{name}" for name in ("inverted", "shuffled")
}  # a run of `rlsd` is audited: it has no gate
FIGURES = ("cosine", "batch_cosine", "batch_share", "averaged_cosine")
STEPS, ROUNDS, PROBLEMS, SEEDS = 300, 6, 256, 8
AUDITED_SEEDS = 4  # of each world; their figures are averaged
PERMUTATIONS = 10_000
LEVEL = 0.05
NOTHING = 0.02  # H3: this much accuracy is as good as none
RESULTS = Path(__file__).parent / "map"  # world-0.json and so on


def dials(world: World) -> str:
    """`forks=2,pivots=1,filler=3,style=0.5`, and `early` where a world has it: runs are found by this text."""
    return ",".join(f"{name}={value}" for name, value in vars(world).items() if name != "early" or value)


def settings(world: World, model: str) -> list[str]:
    """The `--set` lines of a world's runs."""
    uri = f"tiny-worlds:{dials(world)}"
    return [
        f"rounds={ROUNDS}",
        f"model.path={model}",
        f"source.uri={uri}",
        f"evaluation.source.uri={uri}",
        f"evaluation.problems={PROBLEMS}",
        f"grade.answer_pattern={ANSWER_PATTERN}",
        "objective.gamma=1",
        "objective.rlsd_lam=1",
        "objective.rlsd_decay_steps=0",
    ]


def design(worlds: list[World]) -> np.ndarray:
    """Weights of every world in the coefficients of 1, forks x style and pivots: [3, W], the pseudo-inverse of [W, 3]."""
    return np.linalg.pinv(np.array([[1.0, world.forks * world.style, world.pivots] for world in worlds]))


def coefficient(differences: np.ndarray, weights: np.ndarray) -> Tested:
    """One coefficient of the differences [W, S, N] in accuracy, by its weights [W]."""
    return over_seeds(np.einsum("w,wsn->sn", weights, differences))


def over_worlds(differences: np.ndarray, worlds: list[World], place: int) -> dict[str, float]:
    """The same coefficient with worlds as the sample, from their mean differences [W, S, N]: least squares, t of W - 3 degrees.

    What a world and its one reasoner have of their own is then noise. `coefficient` takes the worlds as they are.
    """
    weights, means = design(worlds), differences.mean((1, 2))
    found = weights @ means
    rows = np.array([[1.0, world.forks * world.style, world.pivots] for world in worlds])
    freedom = len(worlds) - len(found)
    spread = np.sqrt(((means - rows @ found) ** 2).sum() / freedom * (weights[place] ** 2).sum())
    return {"value": float(found[place]), "p": float(2 * stats.t.sf(abs(found[place]) / max(spread, 1e-15), freedom))}


def rank_correlation(one: np.ndarray, other: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Mean over objectives of Spearman's correlation over worlds, [W, K] twice, and its p-value by permuting worlds.

    An objective that is the same in all worlds counts as 0.
    """
    left, right = (ranks - ranks.mean(0) for ranks in (stats.rankdata(one, axis=0), stats.rankdata(other, axis=0)))
    size = np.sqrt((left**2).sum(0) * (right**2).sum(0))

    def mean(order: np.ndarray) -> float:
        return float(((left[order] * right).sum(0) / np.where(size > 0, size, 1)).mean())

    rng, here = np.random.default_rng(seed), mean(np.arange(len(one)))
    drawn = np.array([mean(rng.permutation(len(one))) for _ in range(PERMUTATIONS)])
    return here, float((1 + (drawn >= here - 1e-12).sum()) / (1 + PERMUTATIONS))


def power(hypothesis: str, slope: float, worlds: list[World], seeds: int = SEEDS, times: int = 400) -> float:
    """Share of simulated maps that keep H1, H2 or H3 when a unit of its dial is worth `slope` points, before Holm's correction.

    The dial of H1 is forks x style, that of H2 pivots, and that of H3 is none: there `slope` is the constant itself.
    """
    place = {"H3": 0, "H1": 1, "H2": 2}[hypothesis]
    rng, weights, kept = np.random.default_rng(0), design(worlds)[place], 0
    x = np.array([(1.0, world.forks * world.style, float(world.pivots))[place] for world in worlds])
    for _ in range(times):
        shift = slope * x[:, None] / 100 + 0.03 * rng.standard_normal((len(worlds), seeds))
        answers = rng.choice([-1.0, 0.0, 1.0], p=[0.05, 0.9, 0.05], size=(len(worlds), seeds, PROBLEMS))
        found = coefficient(answers + shift[..., None], weights)
        if hypothesis == "H3":
            kept += found.low > -NOTHING and found.high < NOTHING
        else:
            kept += found.value > 0 and found.p is not None and found.p < LEVEL
    return kept / times


def run(arguments: list[str]) -> None:
    """One command of the project in a process of its own. Raises CalledProcessError when it fails."""
    print("+", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def make(out: Path, place: int, world: World, seeds: int, results: Path = RESULTS) -> None:
    """Warm-start the reasoner of a world, train everything, audit two rounds, and keep the figures in `results`.

    What is there already is left alone.
    """
    model, folder, kept = out / f"model-{place}", out / f"world-{place}", results / f"world-{place}.json"
    if kept.exists():
        return
    if not (model / "warmstart.json").exists():
        run(["pipeline.models.warmstart", "--out", str(model), "--steps", str(STEPS), "--threads", "1", "--world", dials(world)])
    sets = [part for text in settings(world, str(model)) for part in ("--set", text)]
    run(["tests.benchmarks.bench_map", "--train", str(folder), "--seeds", str(seeds), *sets])
    for file in audits(folder, 0) + audits(folder, ROUNDS // 2):
        if not file.exists():
            audited = ["--round", str(int(file.stem[-4:])), "--objectives", ",".join(AUDITED.values())]
            run(["jobs", "audit", "--run", str(file.parent.parent), *audited])
    base = resolve(demo(), settings(world, str(model)))
    answers = {
        name: [packed(row) for row in accuracy(folder, base, name, range(seeds))] for name in chosen_objectives(OBJECTIVES)
    }
    rounds = (0, ROUNDS // 2)
    seen = {str(number): [figures_of(file) for file in audits(folder, number)] for number in rounds}
    told = {str(number): [labels_of(file) for file in audits(folder, number)] for number in rounds}
    results.mkdir(exist_ok=True)
    kept.write_text(json.dumps({"world": vars(world), "answers": answers, "audits": seen, "labels": told}, indent=1) + "\n")


def audits(folder: Path, number: int) -> list[Path]:
    """The files of a world's audits of one round."""
    return [folder / f"rlsd-s{seed}/evidence/audit-{number:04d}.json" for seed in range(AUDITED_SEEDS)]


def figures_of(file: Path) -> dict[str, dict[str, float | None]]:
    """The figures of an audit, by objective. None is one that its traces do not tell."""
    points = {point["name"]: point for point in json.loads(file.read_text())["points"]}
    told = {name: {figure: points[called][figure] for figure in FIGURES} for name, called in AUDITED.items()}
    return {name: {figure: one and one["value"] for figure, one in figures.items()} for name, figures in told.items()}


def labels_of(file: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """What an audit saw of the true classes of its world, and how well the regimes found them."""
    labels: dict[str, dict[str, dict[str, float | None]]] = json.loads(file.read_text())["classes"]["labels"]
    return labels


def train(folder: str, seeds: int, sets: list[str]) -> None:
    """One comparison, as `egrsd compare` makes it, with a trainer in a thread of this process."""
    with trainer_here.instead_of_ray_train():
        compare.compare(folder, compare.Options("demo", OBJECTIVES, f"0..{seeds - 1}", None, sets, None), None, debug=True)


def accuracy(folder: Path, base: Run, name: str, seeds: range) -> np.ndarray:
    """Right answers of an objective, [S, N], of a world's finished runs."""
    series = Series()
    for seed in seeds:
        key = Key(name, seed)
        add_point(series, Store(str(folder / key.name)), key, variant(base, name, seed))
    return np.stack([series.accuracy[seed] for seed in seeds])


def packed(right: np.ndarray) -> str:
    """One hexadecimal digit for four answers, the first answer in its highest bit. Raises ValueError for a part of an answer."""
    if not np.isin(right, (0, 1)).all():
        raise ValueError("an answer is right or wrong")
    return np.packbits(right.astype(np.uint8)).tobytes().hex()


def unpacked(text: str) -> np.ndarray:
    """The answers of `packed`, as 0.0 and 1.0."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)).astype(float)


def read(results: Path, worlds: list[World]) -> tuple[dict[str, np.ndarray], list[dict]]:
    """Answers of each objective [W, S, N], and the audits of each world, from its file. Raises ValueError for another world's."""
    files = [json.loads((results / f"world-{place}.json").read_text()) for place in range(len(worlds))]
    for world, one in zip(worlds, files, strict=True):
        if World(**one["world"]) != world:
            raise ValueError(f"a file of {results} is of another world: {one['world']}")
    names = files[0]["answers"]
    answers = {name: np.array([[unpacked(row) for row in one["answers"][name]] for one in files]) for name in names}
    return answers, [one["audits"] for one in files]


def gaps(audits: list[dict], names: list[str], number: int, figure: str, absent: float | None = None) -> np.ndarray:
    """How far a figure of an objective lies above that of `rlsd` in a round, as means over a world's audits: [W, K].

    Audits that do not tell it are left out, or count as `absent` where they tell that of `rlsd`. Where no audit of a world tells
    it, the world gets the mean of the others.
    """
    rows = [one[str(number)] for one in audits]
    seen = np.full((len(rows), len(names)), np.nan)
    for world, one in enumerate(rows):
        for place, name in enumerate(names):
            pairs = [(absent if row[name][figure] is None else row[name][figure], row["rlsd"][figure]) for row in one]
            if told := [a - b for a, b in pairs if a is not None and b is not None]:
                seen[world, place] = np.mean(told)
    known = np.isfinite(seen)
    means = np.where(known, seen, 0).sum(0) / np.maximum(known.sum(0), 1)
    return np.where(known, seen, means)


def conclude(results: Path, worlds: list[World]) -> dict[str, object]:
    """The hypotheses, and how well the audit predicts training, from the files of `worlds` in `results`."""
    found, audits = read(results, worlds)
    constant, forks, pivots = design(worlds)
    gate, ahead = found["egrsd"] - found["rlsd"], found["cl_egrsd"] - found["egrsd"]
    tested = [coefficient(gate, forks), coefficient(ahead, pivots)]
    raised = holm([1.0 if part.p is None else part.p for part in tested])
    names = list(AUDITED)[1:]
    trained = np.stack([(found[name] - found["rlsd"]).mean((1, 2)) for name in names], axis=1)
    asked = [(number, figure) for number in (0, ROUNDS // 2) for figure in FIGURES]
    predicted = {f"round {n}, {figure}": rank_correlation(gaps(audits, names, n, figure), trained) for n, figure in asked}
    of_gates = names.index("egrsd"), names.index("cl_egrsd")  # gamma 1, without and with a window, against gamma 0
    gates = {
        f"round {n}, {figure}": rank_correlation(gaps(audits, names, n, figure)[:, of_gates], trained[:, of_gates])
        for n, figure in asked
    }
    no_direction = {f"round {n}, {figure}": rank_correlation(gaps(audits, names, n, figure, 0.0), trained) for n, figure in asked}
    return {
        "H1": {**vars(tested[0]), "p_holm": raised[0]},
        "H2": {**vars(tested[1]), "p_holm": raised[1]},
        "H3": vars(coefficient(gate, constant)),
        "audit": predicted,
        "validated": [name for name, (_, p) in predicted.items() if p < LEVEL / len(predicted)],
        "added later": {
            "H1 over worlds": over_worlds(gate, worlds, 1),
            "H2 over worlds": over_worlds(ahead, worlds, 2),
            "audit, no direction as 0": no_direction,
            "audit, gates alone": gates,
        },
        "means": {name: values.mean((1, 2)).tolist() for name, values in found.items()},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worlds", type=int, default=len(WORLDS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--power", action="store_true")
    parser.add_argument("--only", type=lambda text: [int(place) for place in text.split(",")])
    parser.add_argument("--train", help=argparse.SUPPRESS)  # the process of one comparison
    parser.add_argument("--set", action="append", default=[], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.train:
        train(asked.train, asked.seeds, asked.set)
        return
    worlds = WORLDS[: asked.worlds]
    if asked.power:
        for name, slopes in (("H1", (0.25, 0.5, 1.0, 1.5)), ("H2", (0.5, 1.0, 1.5)), ("H3", (0.0, 1.0, 2.0))):
            for slope in slopes:
                share = power(name, slope, worlds, asked.seeds)
                print(f"{name}, {slope} points for each unit of its dial: kept in {100 * share:.0f} %", flush=True)
    elif asked.out is not None:
        for place, world in enumerate(worlds):
            if asked.only is None or place in asked.only:
                make(asked.out, place, world, asked.seeds)
    else:
        print(json.dumps(conclude(RESULTS, worlds), indent=1))


if __name__ == "__main__":
    main()
