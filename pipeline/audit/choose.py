"""Which gate to train with: gamma and window by the averaged cosine of an audit, and how many traces it takes to be surer.

Nine generated worlds are the evidence for the averaged cosine (tests/benchmarks/MAP.md). It ranked what gates gained there.
"""

from __future__ import annotations

import itertools
from typing import Any

from pipeline.config import Run
from pipeline.errors import SettingError
from pipeline.evidence.intervals import quantile
from pipeline.overrides import resolve

EVIDENCE = "evidence/choice.json"
AXES = ("label.gamma", "profile.window")  # of `egrsd sweep`: the gate of labels and that of training have one formula
GRID = ("label.gamma=.1,.3,1", "label.window=0,3,5")
UNGATED = "gamma 0"
FIGURE = "averaged_cosine"


def gates(run: Run, axes: dict[str, list[Any]]) -> dict[str, Run | None]:
    """The run with each gate of a grid, by its name; the first has none. Raises SettingError for another axis."""
    if other := [name for name in axes if name not in AXES]:
        raise SettingError("is no axis of --choose", other[0], "Write label.gamma=... and label.window=...")
    objective = run.objective
    gammas, windows = (axes.get(name, [value]) for name, value in zip(AXES, (objective.gamma, objective.window), strict=True))
    found: dict[str, Run | None] = {UNGATED: _gated(run, 0.0, 0)}
    for gamma, window in itertools.product(gammas, windows):
        if gamma:
            found[f"gamma {gamma:g}, window {window}"] = _gated(run, gamma, window)
    if len(found) == 1:
        raise SettingError("has no gate: gamma is 0", "--set label.gamma", "List a gamma above 0")
    return found


def _gated(run: Run, gamma: float, window: int) -> Run:
    return resolve(run, ["objective.name=cl_egrsd", f"objective.gamma={gamma}", f"objective.window={window}"])


def choose(audit: dict[str, Any], asked: dict[str, Run | None], seconds: float | None) -> dict[str, Any]:
    """The document evidence/choice.json, from the audit of `gates` in their order.

    Intervals against gamma 0 hold for all gates together (Bonferroni). A gate is chosen when its own lies above 0: the one with
    the largest difference. wanted: what a surer choice needs, in traces of this kind. With a chosen gate, its interval becomes
    half as wide. Without one, the most distant gate is told apart. seconds: of engines for all traces of the audit; None where
    it is not known.
    """
    found = {point["name"]: point for point in audit["points"]}
    freedom, tests = audit["blocks"] - 1, len(asked) - 1
    wider = quantile(freedom, 1 - 0.025 / tests) / quantile(freedom, 0.975)
    points = [_point(found[name], run, wider) for name, run in asked.items() if run is not None]
    told = [point for point in points[1:] if point["gap"] is not None]
    above = [point for point in told if point["gap"]["low"] > 0]
    best = max(above or told, key=lambda point: point["gap"]["value"] if above else abs(point["gap"]["value"]), default=None)
    wanted = None
    if best is not None and best["gap"]["value"]:
        times = 4.0 if above else max(1.0, (best["gap"]["half"] / abs(best["gap"]["value"])) ** 2)
        wanted = {"gate": best["gate"], "times": times, "traces": round(audit["traces"] * (times - 1))}
        wanted["seconds"] = seconds and seconds * (times - 1)
    return {
        "run": audit["run"],
        "round": audit["round"],
        "policy": audit["policy"],
        "traces": audit["traces"],
        "points": points,
        "chosen": best if above else None,
        "worse": bool(told) and all(point["gap"]["high"] < 0 for point in told),
        "wanted": wanted,
    }


def _point(audited: dict[str, Any], run: Run, wider: float) -> dict[str, Any]:
    gap, shown = audited["difference"].get(FIGURE), None
    if gap is not None:
        half = wider * (gap["high"] - gap["value"])
        shown = {"value": gap["value"], "low": gap["value"] - half, "high": gap["value"] + half, "half": half}
    settings = {"gamma": run.objective.gamma, "window": run.objective.window}
    return {"gate": audited["name"], **settings, FIGURE: audited[FIGURE], "gap": shown}


def sentences(document: dict[str, Any]) -> list[str]:
    """What the document says: the choice, its evidence, and the cost of a surer one."""
    chosen, wanted, found = document["chosen"], document["wanted"], []
    if chosen is not None:
        gap = "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**chosen["gap"])
        found.append(f"choice: {chosen['gate']}, whose averaged cosine is {gap} above that of gamma 0")
        found.append(f"train with --set objective.gamma={chosen['gamma']:g} --set objective.window={chosen['window']}")
    elif document["worse"]:
        found.append("choice: gamma 0, because every gate of the grid lowers the averaged cosine")
    elif wanted is not None:
        found.append("choice: none. These traces tell no gate of the grid apart from gamma 0 in the good direction")
    else:
        found.append("choice: none. These traces are too few, or too noisy, to tell a direction")
    if wanted is not None:
        aim = "to halve this interval" if chosen is not None else f"to tell {wanted['gate']} from gamma 0"
        cost = "" if wanted["seconds"] is None else f", some {wanted['seconds']:.0f} s of engines as in this round"
        if wanted["times"] > 1:
            found.append(f"{aim}: {wanted['times']:.1f} times these traces, {wanted['traces']} more{cost}")
    return found
