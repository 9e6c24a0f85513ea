"""Which gate to train with: gamma and window by the averaged cosine of an audit, and how many traces it takes to be surer.

Nine generated worlds are the evidence for the averaged cosine (tests/benchmarks/MAP.md). It ranked what gates gained there.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from pipeline.audit.figures import together
from pipeline.config import Run
from pipeline.errors import SettingError
from pipeline.evidence.intervals import quantile
from pipeline.overrides import resolve

EVIDENCE = "evidence/choice.json"
AXES = ("label.gamma", "profile.window")  # of `egrsd sweep`: the gate of labels and that of training have one formula
GRID = ("label.gamma=.1,.3,1", "label.window=0,3,5")
UNGATED = "gamma 0"
POWER = 0.8  # share of the audits that tell a difference, with the traces that are named for it
FIGURE = "averaged_cosine"
GAINS = "The gains themselves were .0 points on average there, .9 at most and -1.1 at least (tests/benchmarks/MAP.md)."


def gates(run: Run, axes: dict[str, list[Any]]) -> dict[str, Run | None]:
    """The run with each gate of a grid, by its name; the first has none. Raises SettingError for another axis."""
    if other := [name for name in axes if name not in AXES]:
        raise SettingError("is no axis of --choose", other[0], "Write label.gamma=... and label.window=...")
    objective = run.objective
    gammas, windows = (axes.get(name, [value]) for name, value in zip(AXES, (objective.gamma, objective.window), strict=True))
    found: dict[str, Run | None] = {UNGATED: resolve(run, settings(0.0, 0))}
    for gamma, window in itertools.product(gammas, windows):
        if gamma:
            found[f"gamma {gamma:g}, window {window}"] = resolve(run, settings(gamma, window))
    if len(found) == 1:
        raise SettingError("has no gate: gamma is 0", "--set label.gamma", "List a gamma above 0")
    return found


def settings(gamma: float, window: int) -> list[str]:
    """The `--set` lines of a gate. They name all of it, whatever gate or control the run has."""
    gate = ["objective.name=cl_egrsd", "objective.gate=own", "objective.control=none", "objective.entropy=teacher"]
    return [*gate, f"objective.gamma={gamma:g}", f"objective.window={window}"]


def choose(audit: dict[str, Any], asked: dict[str, Run | None], seconds: float | None) -> dict[str, Any]:
    """The document evidence/choice.json, from the audit of `gates` in their order.

    Intervals against gamma 0 hold for all gates together (Bonferroni). A gate is chosen when its own lies above 0: the one with
    the largest difference. wanted: what a surer choice needs. With a chosen gate, its interval becomes half as wide. Without one,
    the gate that may be better and is nearest to be told apart. That then happens in four of five audits, if its difference is
    the one seen. Its `sample` are traces whose gradients are taken, since these alone tell a cosine. Its `traces` are those that
    the round lacks. seconds: of engines for all traces of the audit; None where it is not known.
    """
    found = {point["name"]: point for point in audit["points"]}
    points = [_point(found[name], run, audit["blocks"], len(asked) - 1) for name, run in asked.items() if run is not None]
    gaps = [point["gap"] for point in points[1:]]
    told = [point for point in points[1:] if point["gap"] is not None]
    above = [point for point in told if point["gap"]["low"] > 0]
    chosen = max(above, key=lambda point: point["gap"]["value"], default=None)
    open_ = [point for point in told if point["gap"]["value"] > 0]
    nearest = chosen or min(open_, key=lambda point: _times(point["gap"], audit["blocks"], len(gaps)), default=None)
    wanted = None
    if nearest is not None:
        times = 4.0 if chosen else _times(nearest["gap"], audit["blocks"], len(gaps))
        sample = math.ceil(audit["sample"] * times)
        wanted = {"gate": nearest["gate"], "times": times, "sample": sample, "traces": max(0, sample - audit["traces"])}
        wanted["seconds"] = seconds and seconds * wanted["traces"] / audit["traces"]
    return {
        "run": audit["run"],
        "round": audit["round"],
        "policy": audit["policy"],
        "measured": audit["measured"],
        "sampling": audit["sampling"],
        "traces": audit["traces"],
        "sample": audit["sample"],
        "blocks": audit["blocks"],
        "points": points,
        "chosen": chosen,
        "worse": all(gap is not None and gap["high"] < 0 for gap in gaps),
        "told": bool(told),
        "wanted": wanted,
    }


def _times(gap: dict[str, float], blocks: int, tests: int) -> float:
    """How many times the traces lift the lower end above 0 in POWER of the audits, if the difference is the one seen.

    Noise falls with the root of the traces. gap: of `together`, for so many tests.
    """
    down = gap["value"] - gap["low"]
    error = down / quantile(blocks - 1, 1 - 0.025 / tests)
    return float(((down + error * quantile(blocks - 1, POWER)) / gap["value"]) ** 2)


def _point(audited: dict[str, Any], run: Run, blocks: int, tests: int) -> dict[str, Any]:
    gate = {"gamma": run.objective.gamma, "window": run.objective.window}
    gap = together(audited["difference"].get(FIGURE), blocks, tests)
    return {"gate": audited["name"], **gate, FIGURE: audited[FIGURE], "gap": gap}


def sentences(document: dict[str, Any]) -> list[str]:
    """What the document says: the choice, its evidence, and the cost of a surer one."""
    chosen, wanted, found = document["chosen"], document["wanted"], []
    if chosen is not None:
        gap = "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**chosen["gap"])
        found.append(f"choice: {chosen['gate']}, whose averaged cosine is {gap} above that of gamma 0")
        found.append(f"train with {' '.join(f'--set {line}' for line in settings(chosen['gamma'], chosen['window']))}")
    elif document["worse"]:
        found.append("choice: gamma 0, because every gate of the grid lowers the averaged cosine")
    elif document["told"]:
        found.append("choice: none. These traces tell no gate of the grid apart from gamma 0 in the good direction")
    else:
        found.append("choice: none. These traces are too few, or too noisy, to tell a direction")
    if wanted is not None:
        aim = "to halve this interval" if chosen is not None else f"to tell {wanted['gate']} from gamma 0 in four of five audits"
        found.append(f"{aim}: {_price(document, wanted)}")
    return found


def _price(document: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What a surer choice costs. First come the gradients of traces that the round has and whose gradients were not taken."""
    times, sample, traces = wanted["times"], wanted["sample"], document["traces"]
    cost = "" if wanted["seconds"] is None else f", some {wanted['seconds']:.0f} s of engines as in this round"
    more = f"{wanted['traces']} more{cost}, with `--sample {sample}`"
    if document["sample"] == traces:
        return f"{times:.1f} times these traces, {more}"
    gradients = f"gradients of {sample} traces, {times:.1f} times as many"
    if sample <= traces:
        return f"{gradients}. This round has them: add `--sample {sample}`"
    return f"{gradients}. `--sample {traces}` takes all of this round first. The rest is {more}"
