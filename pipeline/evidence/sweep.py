"""Sweeps: stored traces labelled in memory with every combination of settings, and what their weights become.

Nothing is generated and nothing of the run changes; the figures are kept in evidence/sweep.json.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.config import Label, Profile, Run
from pipeline.contract import Regime
from pipeline.errors import SettingError, UserError
from pipeline.evidence.plain import plain
from pipeline.method.relabel import Figures, Point, Relabel, StoredSignals, select, token_weights
from pipeline.overrides import resolve
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round, open_rounds
from pipeline.rounds.rows import training_rows
from pipeline.store.directory import Store, area

if TYPE_CHECKING:
    from pipeline.training.batches import Traces

EVIDENCE = "evidence/sweep.json"
PAPER = ("label.gamma=0,.1,.3,1", "label.window=0,1,3,5,7")  # the axes where no `--set` names one
SETTINGS = (*(f"label.{name}" for name in Label.model_fields), *(f"profile.{name}" for name in Profile.model_fields))
ALIASES = {"label.window": "profile.window"}  # labels look ahead as far as the profile does
MOST_POINTS = 1000
GRADIENT_ROUNDS = 3
MADE_FROM = ("prompts", "rollout", "grade", "score")
DIGITS = 6  # significant digits of the figures on file


# ---- the grid ----------------------------------------------------------------------------------------------------------


def read_grid(run: Run, sets: list[str]) -> dict[str, list[Any]]:
    """`label.gamma=0,.1,.3` -> {"label.gamma": [0.0, 0.1, 0.3]}: values have the settings' own types, and each is there once.

    Raises SettingError for what is not written name=value,value, a name that is given twice, a setting that labels do not read,
    and a value that the setting does not take.
    """
    axes: dict[str, list[Any]] = {}
    for text in sets:
        name, sep, listed = text.partition("=")
        name = ALIASES.get(name.strip(), name.strip())
        values = [value.strip() for value in listed.split(",")]
        if not sep or not name or not all(values):
            raise SettingError(
                "an axis of the grid is written name=value,value", f"--set {text}", "For example --set label.gamma=0,.1,.3"
            )
        if name in axes:
            raise SettingError("is given twice", name, "List all its values in one --set, separated by commas")
        if name not in SETTINGS:
            resolve(run, [f"{name}={values[0]}"])  # an unknown name ends here, with the nearest known one
            raise SettingError("labels do not read this setting", name, f"A sweep varies: {', '.join(sorted(SETTINGS))}")
        axes[name] = list(dict.fromkeys(_value(_alone(run, name, value), name) for value in values))
    return axes


def grid(run: Run, axes: dict[str, list[Any]]) -> list[Point]:
    """Every combination of the values, the last axis fastest. Raises SettingError on a combination that is not allowed."""
    size = math.prod(map(len, axes.values()))
    if size > MOST_POINTS:
        raise SettingError(f"the grid has {size} points, at most {MOST_POINTS} are swept", "--set", "List fewer values")
    combinations = itertools.product(*axes.values())
    return [point_of(_resolved(run, dict(zip(axes, values, strict=True)))) for values in combinations]


def point_of(run: Run) -> Point:
    """The label settings of a run."""
    return Point(run.profile, run.label)


def _alone(run: Run, name: str, value: str) -> Run:
    """`run` with one value; thresholds are ordered among themselves only once a whole combination stands."""
    free = {"profile.tau_low": "profile.tau_high=1", "profile.tau_high": "profile.tau_low=0"}
    return resolve(run, [*([free[name]] if name in free else []), f"{name}={value}"])


def _resolved(run: Run, values: dict[str, Any]) -> Run:
    document: dict[str, Any] = {}
    for name, value in values.items():
        section, key = name.split(".")
        document.setdefault(section, {})[key] = value
    return resolve(run, [], document)


def _settings(point: Point) -> dict[str, Any]:
    sections = {"label": point.label, "profile": point.profile}
    return {f"{section}.{name}": value for section, settings in sections.items() for name, value in settings}


def _value(run: Run, setting: str) -> Any:
    section, key = setting.split(".")
    return getattr(getattr(run, section), key)


# ---- stored traces -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stored:
    """The traces that are swept: by round, and the signals of all rounds one after another."""

    run: Run
    rounds: list[Round]
    traces: list[Traces]
    signals: StoredSignals


def choose_rounds(store: Store, run: Run, numbers: list[int] | None) -> list[Round]:
    """The rounds asked for, or all, that have what labels are made from. Raises UserError where there is none."""
    whole = {work.number: work for work in open_rounds(store, run) if Inventory(work).is_whole(*MADE_FROM)}
    if not whole:
        raise UserError("no round is labelled, nor has the scores for it", store.uri, "Run `egrsd distill` first")
    if missing := sorted(set(numbers or []) - whole.keys()):
        known = ", ".join(map(str, whole))
        raise UserError(f"round {missing[0]} is not there, or not measured yet", store.uri, f"Rounds that can be swept: {known}")
    return [work for number, work in whole.items() if numbers is None or number in numbers]


def stale_note(work: Round) -> str | None:
    """A line about a round whose grades or scores would be computed again; it is swept as it is stored."""
    seen = Inventory(work)
    reasons = sorted({reason for name in ("grade", "score") for reason in seen.reasons(name)})
    return f"note: {work.area} is stale ({', '.join(reasons)}); swept as it is stored" if reasons else None


def read(run: Run, rounds: list[Round]) -> Stored:
    """The stored traces of these rounds. Raises UserError where every trace was rejected."""
    traces = [read_traces(work) for work in rounds]
    lengths = np.concatenate([part.response_tokens.lengths for part in traces])
    if not len(lengths):
        raise UserError("every trace was rejected", rounds[0].store.uri, "`egrsd status` counts the reasons")
    columns = {
        name: np.concatenate([getattr(part, name).take(np.arange(len(part.trace_ids))) for part in traces])
        for name in ("teacher_entropy", "teacher_logprobs", "student_logprobs")
    }
    scopes = [scope for work in rounds if (scope := Inventory(work).scope) is not None]
    signals = StoredSignals(
        entropy=columns["teacher_entropy"],
        teacher_logprobs=columns["teacher_logprobs"],
        student_logprobs=columns["student_logprobs"],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        advantage=np.concatenate([part.advantage for part in traces]),
        rounds=np.concatenate([[0], np.cumsum([len(part.trace_ids) for part in traces])]),
        peaks=np.array([peak for peak, _ in scopes], np.float64),
        vocab_size=scopes[0][1],
    )
    return Stored(run, rounds, traces, signals)


def read_traces(work: Round) -> Traces:
    """The traces of a round that may be labelled and trained on, as they are stored now."""
    from pipeline.training import batches

    hashes = Inventory(work).hashes(MADE_FROM)
    tables = [training_rows(work.store, work.area, shard, hashes[shard], work.policy_version) for shard in sorted(work.shards)]
    data = batches.RoundTable(work.number, work.policy_version, pa.concat_tables(tables))
    return batches.usable(data, max_staleness=work.number)


# ---- gradients ---------------------------------------------------------------------------------------------------------


def gradient_cosines(stored: Stored, points: list[Point], sample: int) -> dict[str, dict[str, Any]]:
    """By round, for up to three of them from first to last: cosine of every point's gradient with that at gamma = 0.

    The student holds the adapter that wrote the round. About `sample` traces in all are used; they have an advantage and are
    chosen by the run's seed. Rounds whose policy is not kept are passed by.
    """
    import torch

    from pipeline.training import student

    run, places = stored.run, _gradient_rounds(stored)
    if run.train.threads:  # as the trainer: on busy cores a second thread waits more than it works
        torch.set_num_threads(run.train.threads)
    model = student.build(run, torch.device("cpu")).eval() if places else None
    result = {}
    for place in places:
        work, usable = stored.rounds[place], np.flatnonzero(stored.traces[place].advantage)
        count = min(len(usable), -(-sample // len(places)))
        rows = np.sort(np.random.default_rng([run.seed, work.number]).choice(usable, count, replace=False))
        cosine = _cosines(model, stored, place, rows, points)
        result[str(work.number)] = {"policy": work.policy_version, "traces": count, "cosine": cosine.tolist()}
    return result


def _gradient_rounds(stored: Stored) -> list[int]:
    """Places of the rounds that give gradients, from first to last."""
    kept = [
        place
        for place, work in enumerate(stored.rounds)
        if work.store.has_policy(work.policy_version) and stored.traces[place].advantage.any()
    ]
    if not kept:
        return []
    return np.array(kept)[np.unique(np.linspace(0, len(kept) - 1, GRADIENT_ROUNDS).round().astype(int))].tolist()


def _cosines(model: Any, stored: Stored, place: int, rows: np.ndarray, points: list[Point]) -> np.ndarray:
    """Cosines [number of points] on some rows of one round."""
    from pipeline.training import checkpoint, gradients

    run, work, chosen = stored.run, stored.rounds[place], select(stored.signals, place, rows)
    weights = token_weights(chosen, points)
    reference = token_weights(chosen, [point.ungated() for point in points])
    work.store.policy(work.policy_version)  # or it says that it is not published
    with work.store.local(area("policy", work.policy_version)) as folder:
        if folder is not None:  # policy 0 is the base: the fresh adapter
            checkpoint.load_adapter(model, folder, run.model)
    return gradients.cosines(model, stored.traces[place], rows, weights, reference, run.train.micro_batch_tokens)


# ---- what comes out ----------------------------------------------------------------------------------------------------


def summarise(
    stored: Stored,
    axes: dict[str, list[Any]],
    figures: dict[Point, Figures],
    gradient: dict[str, dict[str, Any]],
    clock: dict[str, float],
) -> dict[str, Any]:
    """evidence/sweep.json: what was swept, the figures of every point in grid order, deciles, gradients, seconds."""
    points = []
    for index, (point, values) in enumerate(figures.items()):
        cosine = [part["cosine"][index] for part in gradient.values()]
        points.append({"settings": _settings(point), **plain(values, DIGITS), "cosine": plain(cosine, DIGITS)})
    return {
        "run": stored.run.name,
        "axes": axes,
        "stored": _settings(point_of(stored.run)),
        "rounds": [work.number for work in stored.rounds],
        "traces": len(stored.signals.advantage),
        "traces_with_signal": int(np.count_nonzero(stored.signals.advantage)),
        "tokens": len(stored.signals.entropy),
        "regimes": list(Regime.NAMES),
        "points": points,
        "deciles": plain(Relabel(stored.signals).deciles(), DIGITS),
        "gradient": plain(gradient, DIGITS),
        "seconds": {name: round(seconds, 3) for name, seconds in clock.items()},
    }
