"""`egrsd sweep`: label stored traces in memory with every combination of settings, compare, and keep the figures as evidence."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from jobs.session import Session, session
from pipeline.config import Run, resolve
from pipeline.contract import Regime
from pipeline.errors import SettingError, UserError
from pipeline.method.relabel import Figures, Point, Relabel, Signals, select, sweep, token_weights
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round, open_rounds
from pipeline.rounds.rows import training_rows
from pipeline.store.directory import Store, area

if TYPE_CHECKING:
    from pipeline.training.batches import Traces

EVIDENCE = "evidence/sweep.json"
PAPER = ("label.gamma=0,.1,.3,1", "label.window=0,1,3,5,7")  # what is swept when nothing is asked for
SETTINGS = {name: f"label.{name}" for name in ("gamma", "floor", "epsilon", "min_normaliser", "lookahead")} | {
    name: f"profile.{name}" for name in ("window", "normaliser", "tau_low", "tau_high")
}
ALIASES = {"label.window": "profile.window"}  # labels look ahead as far as the profile did
MOST_POINTS = 1000
GRADIENT_ROUNDS = 3
MADE_FROM = ("prompts", "rollout", "grade", "score")


def sweep_run(uri: str, sets: list[str], rounds: list[int] | None, sample: int, debug: bool) -> None:
    """Figures of every point of the grid on the run's stored traces: a table, and evidence/sweep.json.

    `sample` traces of up to three rounds give the gradient cosine against gamma = 0; with 0 it is left out. Raises SettingError
    on a malformed grid, UserError when no round has what labels are made from.
    """
    with session(debug) as out:
        store = Store(uri)
        run = store.load_run()
        axes = read_grid(run, sets or list(PAPER))
        chosen = grid(run, axes)
        found = choose_rounds(store, run, rounds, out)
        started = time.perf_counter()
        traces = [read_traces(work) for work in found]
        signals = join(found, traces)
        loaded = time.perf_counter()
        figures = sweep(signals, chosen)
        swept = time.perf_counter()
        cosine = gradient_cosines(run, found, traces, signals, list(figures), sample) if sample else {}
        clock = {"read": loaded - started, "sweep": swept - loaded, "gradient": time.perf_counter() - swept}
        document = evidence(run, axes, found, signals, figures, cosine, clock)
        store.write_json(EVIDENCE, document)
        show(document, out)
        out.say(f"figures: {store.locate(EVIDENCE)}")


# ---- the grid ----------------------------------------------------------------------------------------------------------


def read_grid(run: Run, sets: list[str]) -> dict[str, list[Any]]:
    """`label.gamma=0,.1,.3` -> {"label.gamma": [0.0, 0.1, 0.3]}, values as the settings' own types, duplicates left out.

    Raises SettingError: not name=value,value, a name given twice, a setting that labels do not read, a value it does not take.
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
        if name not in SETTINGS.values():
            resolve(run, [f"{name}={values[0]}"])  # a name that no one knows is told with the nearest that is known
            raise SettingError("labels do not read this setting", name, f"A sweep varies: {', '.join(sorted(SETTINGS.values()))}")
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
    return Point(**{name: _value(run, setting) for name, setting in SETTINGS.items()})


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


def _value(run: Run, setting: str) -> Any:
    section, key = setting.split(".")
    return getattr(getattr(run, section), key)


# ---- stored traces -----------------------------------------------------------------------------------------------------


def choose_rounds(store: Store, run: Run, numbers: list[int] | None, out: Session) -> list[Round]:
    """The rounds asked for, or all, that have what labels are made from. Raises UserError where there is none."""
    whole = {work.number: work for work in open_rounds(store, run) if _measured(work)}
    if not whole:
        raise UserError("no round is labelled, nor has the scores for it", store.uri, "Run `egrsd distill` first")
    if missing := sorted(set(numbers or []) - whole.keys()):
        known = ", ".join(map(str, whole))
        raise UserError(f"round {missing[0]} is not there, or not measured yet", store.uri, f"Rounds that can be swept: {known}")
    chosen = [work for number, work in whole.items() if numbers is None or number in numbers]
    for work in chosen:
        reasons = {reason for name in ("grade", "score") for reason in Inventory(work).reasons(name)}
        if reasons:
            out.say(f"note: {work.area} is stale ({', '.join(sorted(map(str, reasons)))}); swept as it is stored")
    return chosen


def read_traces(work: Round) -> Traces:
    """The traces of a round that may be labelled and trained on, as they are stored now."""
    import pyarrow as pa

    from pipeline.training import batches

    entries = {name: work.store.entries(work.area, name) for name in MADE_FROM}
    tables = [
        training_rows(
            work.store, work.area, shard, {name: entries[name][shard].sha256 for name in MADE_FROM}, work.policy_version
        )
        for shard in sorted(work.shards)
    ]
    data = batches.Round(work.number, work.policy_version, pa.concat_tables(tables))
    return batches.usable(data, max_staleness=work.number)


def join(found: list[Round], traces: list[Traces]) -> Signals:
    """The signals of all rounds, one after another."""
    columns = {
        name: np.concatenate([getattr(part, name).take(np.arange(len(part.trace_ids))) for part in traces])
        for name in ("teacher_entropy", "teacher_logprobs", "student_logprobs")
    }
    lengths = np.concatenate([part.response_tokens.lengths for part in traces])
    if not len(lengths):
        raise UserError("every trace was rejected", found[0].store.uri, "`egrsd status` counts the reasons")
    scopes = [scope for work in found if (scope := Inventory(work).scope) is not None]
    return Signals(
        entropy=columns["teacher_entropy"],
        teacher_logprobs=columns["teacher_logprobs"],
        student_logprobs=columns["student_logprobs"],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        advantage=np.concatenate([part.advantage for part in traces]),
        rounds=np.concatenate([[0], np.cumsum([len(part.trace_ids) for part in traces])]),
        peaks=np.array([peak for peak, _ in scopes], np.float64),
        vocab_size=scopes[0][1],
    )


def _measured(work: Round) -> bool:
    return all(work.shards.keys() <= work.store.entries(work.area, name).keys() for name in MADE_FROM)


# ---- gradients ---------------------------------------------------------------------------------------------------------


def gradient_cosines(
    run: Run, found: list[Round], traces: list[Traces], signals: Signals, points: list[Point], sample: int
) -> dict[str, dict[str, Any]]:
    """By round, for up to three of them from first to last: cosine of every point's gradient with that at gamma = 0.

    The student holds the adapter that wrote the round. It takes about `sample` traces in all that have an advantage, chosen by
    the run's seed. Rounds whose policy is not kept are passed by.
    """
    import torch

    from pipeline.training import student

    kept = [k for k, work in enumerate(found) if work.store.has_policy(work.policy_version) and traces[k].advantage.any()]
    picks = np.array(kept)[np.unique(np.linspace(0, len(kept) - 1, GRADIENT_ROUNDS).round().astype(int))].tolist() if kept else []
    if run.train.threads:  # as the trainer: on busy cores a second thread waits more than it works
        torch.set_num_threads(run.train.threads)
    model = student.build(run, torch.device("cpu")).eval() if picks else None
    flat = [replace(point, gamma=0.0) for point in points]
    result = {}
    for k in picks:
        usable = np.flatnonzero(traces[k].advantage)
        count = min(len(usable), -(-sample // len(picks)))
        rows = np.sort(np.random.default_rng([run.seed, found[k].number]).choice(usable, count, replace=False))
        chosen = select(signals, k, rows)
        weights, reference = token_weights(chosen, points), token_weights(chosen, flat)
        cosine = _cosines(model, run, found[k], traces[k], rows, weights, reference)
        result[str(found[k].number)] = {"policy": found[k].policy_version, "traces": count, "cosine": cosine.tolist()}
    return result


def _cosines(
    model: Any, run: Run, work: Round, traces: Traces, rows: np.ndarray, weights: list[np.ndarray], reference: list[np.ndarray]
) -> np.ndarray:
    from pipeline.training import checkpoint, gradients

    work.store.policy(work.policy_version)  # or it says that it is not published
    with work.store.local(area("policy", work.policy_version)) as folder:
        if folder is not None:  # policy 0 is the base: the fresh adapter
            checkpoint.load_adapter(model, folder, run.model)
    return gradients.cosines(model, traces, rows, weights, reference, run.train.micro_batch_tokens)


# ---- what comes out ----------------------------------------------------------------------------------------------------


def evidence(
    run: Run,
    axes: dict[str, list[Any]],
    found: list[Round],
    signals: Signals,
    figures: dict[Point, Figures],
    gradient: dict[str, dict[str, Any]],
    clock: dict[str, float],
) -> dict[str, Any]:
    """The sweep as plain JSON: what was swept, the figures of every point in grid order, deciles, gradients, seconds."""
    points = []
    for index, (point, values) in enumerate(figures.items()):
        cosine = [part["cosine"][index] for part in gradient.values()]
        points.append({"settings": _settings(point), **_plain(asdict(values)), "cosine": _plain(cosine)})
    return {
        "run": run.name,
        "axes": axes,
        "stored": _settings(point_of(run)),
        "rounds": [work.number for work in found],
        "traces": len(signals.advantage),
        "traces_with_signal": int(np.count_nonzero(signals.advantage)),
        "tokens": len(signals.entropy),
        "regimes": list(Regime.NAMES),
        "points": points,
        "deciles": _plain(asdict(Relabel(signals).deciles())),
        "gradient": _plain(gradient),
        "seconds": {name: round(seconds, 3) for name, seconds in clock.items()},
    }


def show(document: dict[str, Any], out: Session) -> None:
    """The figures as tables."""
    where = f"rounds {document['rounds'][0]} to {document['rounds'][-1]}" if len(document["rounds"]) > 1 else "one round"
    size = f"{document['tokens']} tokens of {document['traces']} traces, {where}"
    out.console.print(_points_table(document, f"{len(document['points'])} points on {size}"))
    for note in NOTES:
        out.console.print(note, style="dim", highlight=False)
    out.console.print(_shares_table(document))
    out.console.print(_decile_table(document))
    clock = document["seconds"]
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in clock.items())
    speed = document["tokens"] * len(document["points"]) / max(clock["sweep"], 1e-3)
    out.say(f"{parts}. {speed / 1e6:.1f} M tokens x points a second")


NOTES = (
    "weight: mean magnitude x gate; restored: mean omega(H^CL) - omega(H); both by regime (l lock, m mid, p pivot, f fork)",
    "kept: sum of |token weights| / that at gamma 0; eff: effective share of tokens (Kish); corr: of weight with |delta|;",
    "cosine: of the gradient with that at gamma 0, mean over sampled rounds",
)


def _points_table(document: dict[str, Any], title: str) -> Table:
    """A row per point, narrow enough for 80 columns."""
    axes = list(document["axes"])
    columns = [*(name.split(".")[1] for name in axes), "weight l m p f", "restored l m p f", "kept", "eff", "corr", "cosine"]
    table = Table(*columns, title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for point in document["points"]:
        cosine = [value for value in point["cosine"] if value is not None]
        table.add_row(
            *(f"{point['settings'][name]}" for name in axes),
            " ".join(_number(value, 2).rjust(4) for value in point["factors"]),
            " ".join(_number(value, 3, "+").replace("0.", ".", 1).rjust(5) for value in point["restored"]),
            *(_number(point[name], 2) for name in ("kept", "effective_share")),
            _number(point["correlation"], 2, "+"),
            _number(sum(cosine) / len(cosine) if cosine else None, 4),
        )
    return table


def _shares_table(document: dict[str, Any]) -> Table:
    """Regime shares, once for each set of settings that decides them."""
    decisive = [name for name in document["axes"] if name.startswith("profile.") or name == "label.min_normaliser"]
    table = Table(
        *(name.split(".")[1] for name in decisive),
        *(f"{name}, %" for name in document["regimes"]),
        title="regimes, share of all tokens",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    rows = {tuple(str(p["settings"][name]) for name in decisive): p["shares"] for p in document["points"]}
    for key, shares in rows.items():
        table.add_row(*key, *(_number(100 * share, 1) for share in shares))
    return table


def _decile_table(document: dict[str, Any]) -> Table:
    """|delta| and weight by decile of entropy, at the last point of the grid."""
    deciles, last = document["deciles"], document["points"][-1]
    swept = ", ".join(f"{name.split('.')[1]} {last['settings'][name]}" for name in document["axes"])
    title = f"deciles of teacher entropy, from the lowest; gate and weight at {swept or 'the stored settings'}"
    table = Table("decile", "tokens", "entropy", "|delta|", "gate", "weight", title=title, title_justify="left", box=None)
    for i, tokens in enumerate(deciles["tokens"]):
        values = (deciles["entropy"][i], deciles["delta"][i], last["decile_gates"][i], last["decile_factors"][i])
        table.add_row(str(i + 1), str(tokens), *(_number(value, 4) for value in values))
    return table


def _settings(point: Point) -> dict[str, Any]:
    return {SETTINGS[name]: value for name, value in asdict(point).items()}


def _plain(value: Any) -> Any:
    """Numbers that JSON holds: arrays as lists, NaN as null, six digits."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | np.ndarray):
        return [_plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"
