"""A sweep labels stored traces in memory with every combination of settings, and measures the token weights of each.

A sweep generates nothing and does not change the run. Its figures are kept in evidence/sweep.json.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.config import Label, Profile, Run
from pipeline.contract import Regime
from pipeline.errors import SettingError, UserError, command, refuse_unread
from pipeline.evidence.documents import DIGITS, mean_of, plain
from pipeline.method.relabel import Figures, Point, Relabel, StoredSignals, select, token_weights
from pipeline.overrides import resolve
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round, open_rounds
from pipeline.rounds.rows import are_of_now, joined, left_out, training_rows, without
from pipeline.stages import MEASURE, chain_of
from pipeline.store.directory import Store, area
from pipeline.store.folders import is_dropped
from pipeline.training import batches, checkpoint, gradients
from pipeline.training.batches import RoundTable, Traces
from pipeline.training.student import student

PAPER = ("label.gamma=0,.1,.3,1", "label.window=0,1,3,5,7")  # the axes when no `--set` names one
SETTINGS = (*(f"label.{name}" for name in Label.model_fields), *(f"profile.{name}" for name in Profile.model_fields))
VARIES = f"A sweep varies: {', '.join(sorted(SETTINGS))}"
ALIASES = {"label.window": "profile.window"}  # labels look ahead as far as the profile does
NOT_KEPT = "dropped (train.keep_policies) or trained again (`egrsd train`)"  # a policy that `is_kept` does not find
MOST_POINTS = 1000
GRADIENT_ROUNDS = 3


# ---- the grid ----------------------------------------------------------------------------------------------------------


def read_grid(run: Run, sets: list[str]) -> dict[str, list[Any]]:
    """Axes by name: `label.gamma=0,.1,.3` -> {"label.gamma": [0.0, 0.1, 0.3]}. Values have the setting's type; equal ones merge.

    Raises SettingError for text that is not name=value,value and for a name that is given twice. Raises it too for a setting
    that labels do not read, and for a value that the setting does not accept.
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
            resolve(run, [f"{name}={values[0]}"])  # raises for an unknown name, and suggests the nearest known one
        refuse_unread("labels do not read this setting", [name], SETTINGS.__contains__, lambda _: VARIES)
        axes[name] = list(dict.fromkeys(_value(_alone(run, name, value), name) for value in values))
    return axes


def grid(run: Run, axes: dict[str, list[Any]]) -> list[Point]:
    """Every combination of the values. The last axis changes fastest. Raises SettingError for a forbidden combination."""
    size = math.prod(map(len, axes.values()))
    if size > MOST_POINTS:
        raise SettingError(f"the grid has {size} points, at most {MOST_POINTS} are swept", "--set", "List fewer values")
    combinations = itertools.product(*axes.values())
    return [point_of(_resolved(run, dict(zip(axes, values, strict=True)))) for values in combinations]


def point_of(run: Run) -> Point:
    """The label settings of a run."""
    return Point(run.profile, run.label)


def _alone(run: Run, name: str, value: str) -> Run:
    """`run` with one value. The other threshold gives way, because only a whole combination can have thresholds out of order."""
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
    """The traces of a sweep: `traces` by round, and the `signals` of all rounds one after another."""

    run: Run
    rounds: list[Round]
    traces: list[Traces]
    signals: StoredSignals


def choose_rounds(store: Store, run: Run, numbers: list[int] | None) -> list[Round]:
    """The rounds `numbers`, or all rounds, that have the stages which labels need. Raises UserError when there is none."""
    whole = {work.number: work for work in open_rounds(store, run) if Inventory(work).is_whole(*MEASURE)}
    if not whole:
        raise UserError(
            "no round is labelled, nor has the scores for it", store.uri, f"Run {command('distill', '--run', store.uri)} first"
        )
    if missing := sorted(set(numbers or []) - whole.keys()):
        known = ", ".join(map(str, whole))
        raise UserError(f"round {missing[0]} is not there, or not measured yet", store.uri, f"Rounds that can be swept: {known}")
    return [work for number, work in whole.items() if numbers is None or number in numbers]


def stale_note(work: Round) -> str | None:
    """A note about a round whose grades or scores are stale, else None. The sweep reads them as they are stored."""
    seen = Inventory(work)
    reasons = sorted({reason for name in chain_of(work.run, ("grade", "score")) for reason in seen.reasons(name)})
    return f"note: {work.area} is stale ({', '.join(reasons)}); swept as it is stored" if reasons else None


def sampling_note(run: Run) -> str | None:
    """A note about sampling under which the reference of an audit is not quite the gradient of accuracy, else None."""
    sampling = run.rollout
    if sampling.temperature == 1 and sampling.top_p == 1 and not sampling.top_k:
        return None
    how = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, top-k {sampling.top_k or 'off'}"
    return f"note: traces were sampled at {how}, so the reference is the gradient of accuracy only nearly"


def read(run: Run, rounds: list[Round]) -> Stored:
    """The stored traces of these rounds. Raises UserError when every trace was rejected."""
    traces = [read_traces(work) for work in rounds]
    lengths = np.concatenate([part.response_tokens.lengths for part in traces])
    if not len(lengths):
        raise UserError(
            "every trace was rejected", rounds[0].store.uri, f"{command('status', rounds[0].store.uri)} counts the reasons"
        )
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
    """The traces of a round that may be trained on, as they are stored now."""
    return batches.usable(read_round(work), max_staleness=work.number)


def read_round(work: Round, further: tuple[str, ...] = ()) -> RoundTable:
    """The rows of a round as they are stored now, with the columns `further` that only some objectives read."""
    hashes, version, left = Inventory(work).hashes(MEASURE), work.policy_version, left_out(work)
    tables = [
        without(training_rows(work.store, work.area, shard, hashes[shard], version, further), left.get(shard, []))
        for shard in sorted(work.shards)
    ]
    return RoundTable(work.number, version, joined(tables))


# ---- gradients ---------------------------------------------------------------------------------------------------------


def gradient_cosines(stored: Stored, points: list[Point], sample: int) -> dict[str, dict[str, Any]]:
    """Cosine of every point's gradient with the gradient at gamma = 0, for up to three rounds from the first to the last.

    The student has the adapter of the policy that wrote the round. The run's seed chooses about `sample` traces in all, among
    those with an advantage. A round is left out whose policy is no longer stored, or was trained again since.
    """
    run, places = stored.run, _gradient_rounds(stored)
    if run.train.threads:  # as in the trainer: on busy cores a second thread slows the work down
        torch.set_num_threads(run.train.threads)
    model = student.build(run, torch.device("cpu")).eval() if places else None
    result = {}
    for place in places:
        work, with_advantage = stored.rounds[place], np.flatnonzero(stored.traces[place].advantage)
        count = min(len(with_advantage), -(-sample // len(places)))
        rows = np.sort(np.random.default_rng([run.seed, work.number]).choice(with_advantage, count, replace=False))
        cosine = _cosines(model, stored, place, rows, points)
        result[str(work.number)] = {"policy": work.policy_version, "traces": count, "cosine": cosine.tolist()}
    return result


def _gradient_rounds(stored: Stored) -> list[int]:
    """Indices of up to GRADIENT_ROUNDS rounds whose policy is stored and which have an advantage, evenly spaced."""
    kept = [place for place, work in enumerate(stored.rounds) if is_kept(work) and stored.traces[place].advantage.any()]
    return spaced(kept)


def is_kept(work: Round) -> bool:
    """Whether the weights of the policy that wrote and scored a round are stored.

    `train.keep_policies` drops them, and `egrsd train` puts others in their place.
    """
    store, version, seen = work.store, work.policy_version, Inventory(work)
    if not store.has_policy(version) or is_dropped(store, area("policy", version)):
        return False
    return all(are_of_now(store, version, seen.entries(stage).values()) for stage in ("rollout", "score"))


def first_step(work: Round) -> int:
    """The optimiser step at which a round began to train, or would. Some objectives change with it (`rlsd_decay_steps`)."""
    steps: dict[int, list[int]] = {}
    for row in work.store.metrics():
        if row["writer"] == "train" and row["round"] <= work.number:
            steps.setdefault(row["round"], []).append(int(row["step"]))
    if work.number in steps:
        return min(steps[work.number])
    return max(map(max, steps.values())) + 1 if steps else 0


def spaced(places: list[int]) -> list[int]:
    """Up to GRADIENT_ROUNDS of some places, from the first to the last, evenly spaced."""
    if not places:
        return []
    return np.array(places)[np.unique(np.linspace(0, len(places) - 1, GRADIENT_ROUNDS).round().astype(int))].tolist()


def load_policy(model: Any, work: Round) -> None:
    """Give a student the adapter of the policy that wrote a round. Raises StoreError when the policy is not published."""
    work.store.policy(work.policy_version)
    with work.store.local(area("policy", work.policy_version)) as folder:
        if folder is not None:  # policy 0 is the base: the fresh adapter
            checkpoint.load_policy(model, folder, work.run.model)


def _cosines(model: Any, stored: Stored, place: int, rows: np.ndarray, points: list[Point]) -> np.ndarray:
    """One cosine for each point, float64 [number of points], on some rows of one round."""
    run, work, chosen = stored.run, stored.rounds[place], select(stored.signals, place, rows)
    weights = token_weights(chosen, points)
    reference = token_weights(chosen, [point.ungated() for point in points])
    load_policy(model, work)
    return gradients.cosines(model, stored.traces[place], rows, weights, reference, run.train.micro_batch_tokens)


# ---- results -----------------------------------------------------------------------------------------------------------


def summarise(
    stored: Stored,
    axes: dict[str, list[Any]],
    figures: dict[Point, Figures],
    gradient: dict[str, dict[str, Any]],
    clock: dict[str, float],
) -> dict[str, Any]:
    """The document evidence/sweep.json: axes and rounds, figures of every point in grid order, deciles, gradients, seconds."""
    points = []
    for index, (point, values) in enumerate(figures.items()):
        cosine = [part["cosine"][index] for part in gradient.values()]
        shown = plain({"cosine": cosine, "cosine_mean": mean_of(cosine)}, DIGITS)
        points.append({"settings": _settings(point), **plain(values, DIGITS), **shown})
    return {
        "run": stored.run.name,
        "axes": axes,
        "stored": _settings(point_of(stored.run)),
        "rounds": [work.number for work in stored.rounds],
        "measured": {str(work.number): Inventory(work).measured for work in stored.rounds},
        "traces": len(stored.signals.advantage),
        "traces_with_signal": int(np.count_nonzero(stored.signals.advantage)),
        "tokens": len(stored.signals.entropy),
        "regimes": list(Regime.NAMES),
        "points": points,
        "deciles": plain(Relabel(stored.signals).deciles(), DIGITS),
        "gradient": plain(gradient, DIGITS),
        "seconds": {name: round(seconds, 3) for name, seconds in clock.items()},
    }
