"""A sweep of objectives: the gradients that each would train with on stored traces, without an engine.

The function that trains makes the gradients (training/step.py): a sample of a round is one minibatch. Figures are kept in
evidence/objectives.json.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch

from pipeline.config import Run
from pipeline.errors import SettingError, UserError
from pipeline.evidence.documents import DIGITS, plain
from pipeline.evidence.sweep import NOT_KEPT, first_step, is_kept, load_policy, read_round, spaced
from pipeline.overrides import refuse_unread_objective, resolve
from pipeline.rounds.round import Round
from pipeline.training import batches
from pipeline.training.batches import Traces
from pipeline.training.step import Trainer
from pipeline.training.student import student

EVIDENCE = "evidence/objectives.json"
MOST_POINTS = 64
SECTION = "objective."


@dataclass(frozen=True)
class Point:
    """One objective of the sweep: the settings that name it, as they were written, and the run with them."""

    settings: dict[str, str]
    run: Run


def are_swept(sets: list[str]) -> bool:
    """Whether the axes are settings of the objective. Raises SettingError when only some of them are."""
    of_objective = [text.strip().startswith(SECTION) for text in sets]
    if any(of_objective) and not all(of_objective):
        other = sets[of_objective.index(False)]
        raise SettingError(
            "axes of the objective and of labels cannot be mixed", f"--set {other}", "Sweep them one after another"
        )
    return any(of_objective)


def grid(run: Run, sets: list[str]) -> list[Point]:
    """Every combination of the values, each distinct objective once. The last axis changes fastest.

    Raises SettingError for text that is not name=value,value, and for an axis that no objective of the grid reads. An
    objective without what it needs raises it too.
    """
    axes: dict[str, list[str]] = {}
    for text in sets:
        name, sep, listed = text.partition("=")
        values = [value.strip() for value in listed.split(",")]
        if not sep or not all(values) or name.strip() in axes:
            raise SettingError(
                "an axis is written once, as name=value,value", f"--set {text}", "For example objective.name=grpo,opd"
            )
        axes[name.strip()] = values
    if math.prod(map(len, axes.values())) > MOST_POINTS:
        raise SettingError(f"the grid has more than {MOST_POINTS} objectives", "--set", "List fewer values")
    found: dict[str, Point] = {}
    for texts in itertools.product(*axes.values()):
        settings = dict(zip(axes, texts, strict=True))
        point = Point(settings, resolve(run, [f"{name}={value}" for name, value in settings.items()]))
        read = {name: value for name, value in point.run.objective if point.run.objective.reads(name)}
        found.setdefault(repr(sorted(read.items())), point)
    refuse_unread_objective([point.run for point in found.values()], [f"{name}={values[0]}" for name, values in axes.items()])
    return list(found.values())


def measure(run: Run, points: list[Point], rounds: list[Round], sample: int) -> dict[str, Any]:
    """The document evidence/objectives.json: effective tokens of every objective, and cosines between their gradients.

    About `sample` traces in all are taken from up to three rounds whose policy is stored, the same for every objective. Raises
    UserError when there is no such round.
    """
    places = spaced([place for place, work in enumerate(rounds) if is_kept(work)])
    if not places:
        remedy = "Sweep other rounds, such as the first, or the run that this one was made from"
        raise UserError(f"every policy that wrote these rounds was {NOT_KEPT}", rounds[0].store.uri, remedy)
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    trainer = Trainer(run, student.build(run, torch.device("cpu")).eval(), torch.device("cpu"))
    parts = [_of_round(trainer, points, rounds[place], -(-max(sample, 1) // len(places))) for place in places]
    matrices = np.stack([part["cosine"] for part in parts])
    strengths = [np.concatenate([part["strengths"][k] for part in parts]) for k in range(len(points))]
    return {
        "run": run.name,
        "rounds": [rounds[place].number for place in places],
        "traces": sum(part["traces"] for part in parts),
        "tokens": len(strengths[0]),
        "points": [
            {"settings": point.settings, **_effective(strengths[k]), **_cosines(matrices[:, 0, k])}
            for k, point in enumerate(points)
        ],
        "cosines": plain(matrices.mean(0).tolist(), DIGITS),
    }


def _of_round(trainer: Trainer, points: list[Point], work: Round, count: int) -> dict[str, Any]:
    """Cosines [points, points] between the gradients of a round's sample, and the strengths of its tokens by point."""
    columns = tuple(dict.fromkeys(name for point in points for name in point.run.objective.columns))
    data = read_round(work, columns)
    usable = [batches.usable(data, work.number, point.run.objective) for point in points]
    common = reduce(np.intersect1d, [traces.trace_ids for traces in usable])
    if not len(common):
        raise UserError("no trace is there from which all these objectives may learn", work.area, "Sweep fewer objectives")
    rng = np.random.default_rng([work.run.seed, work.number])
    chosen = np.sort(rng.choice(common, min(count, len(common)), replace=False))
    load_policy(trainer.student, work)
    trainer.step = first_step(work)
    gradients, strengths = [], []
    for point, traces in zip(points, usable, strict=True):
        trainer.run = point.run
        share = batches.share(traces, _rows(traces, chosen), 0, 1, point.run.train.micro_batch_tokens)
        gradients.append(trainer.gradient(share).double().numpy())
        strengths.append(trainer.strengths(share).numpy())
    flows = np.stack(gradients)
    with np.errstate(invalid="ignore"):  # a gradient of 0 has no direction
        unit = flows / np.linalg.norm(flows, axis=1, keepdims=True)
    return {"cosine": unit @ unit.T, "strengths": strengths, "traces": len(chosen)}


def _rows(traces: Traces, chosen: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.isin(traces.trace_ids, chosen))


def _effective(strengths: np.ndarray) -> dict[str, float | None]:
    """(sum |w|)^2 / sum w^2 (Kish), and its share of all tokens."""
    total, square = float(strengths.sum(dtype=np.float64)), float((strengths.astype(np.float64) ** 2).sum())
    tokens = total**2 / square if square else math.nan
    found: dict[str, float | None] = plain({"effective_tokens": tokens, "effective_share": tokens / len(strengths)}, DIGITS)
    return found


def _cosines(by_round: np.ndarray) -> dict[str, Any]:
    known = by_round[np.isfinite(by_round)]
    mean = float(known.mean()) if len(known) else math.nan
    found: dict[str, Any] = plain({"cosine": by_round.tolist(), "cosine_mean": mean}, DIGITS)
    return found
