"""`egrsd sweep`: label stored traces in memory with every combination of settings, and store the figures as evidence."""

from __future__ import annotations

import time
from typing import Any

from rich.table import Table

from jobs.opened import open_run
from jobs.screen.tables import aligned, write_csv
from jobs.screen.terminal import Session, session
from pipeline.audit import choose, measure
from pipeline.config import Run
from pipeline.config.objective import approximation
from pipeline.errors import SettingError
from pipeline.evidence import objectives
from pipeline.evidence.documents import EVIDENCE, write_evidence
from pipeline.evidence.sweep import (
    PAPER,
    choose_rounds,
    gradient_cosines,
    grid,
    read,
    read_grid,
    sampling_note,
    stale_note,
    summarise,
)
from pipeline.method.relabel import sweep
from pipeline.notices import NOTICE_S, late
from pipeline.rounds import contents
from pipeline.rounds.metrics import is_timed
from pipeline.store.directory import Store

NOTES = (
    "weight: mean magnitude x gate; restored: mean omega(H^CL) - omega(H); both by regime (l lock, m mid, p pivot, f fork)",
    "kept: sum of |token weights| / that at gamma 0; eff: effective share of tokens (Kish); corr: of weight with |delta|;",
    "cosine: of the gradient with that at gamma 0, mean over sampled rounds",
)


CHOICE_NOTES = (
    "averaged cosine: of AdamW's first moment with the gradient of accuracy; 95 % intervals over blocks of problems,",
    "those against gamma 0 for all gates together. On nine generated worlds these differences ranked what gates gained:",
    "rank correlation .84 in round 0 and .45 in round 3, for gamma 1 with and without a window (looked at after the map).",
    choose.GAINS,
)
SAMPLE = 96  # traces for the gradient cosine, where nobody says how many
WHOLE = "note: all weights are trained, and gradient cosines here are of adapters, so they are left out: `egrsd audit` has them"
SLOW = "Gradients take most of it: --sample 0 leaves them out"
OBJECTIVE_NOTE = "eff: effective share of tokens (Kish); cosine: of the gradients, mean over rounds"


def sweep_run(uri: str, sets: list[str], rounds: list[int] | None, sample: int, debug: bool, csv: str | None = None) -> None:
    """Print the figures of every point of the grid on the run's stored traces, and write evidence/sweep.json, and a CSV file.

    `sample` traces of up to three rounds give the gradient cosine against gamma = 0; with 0 it is left out. Axes of `objective.*`
    compare objectives instead, by the gradients that training would take. Raises SettingError
    for a malformed grid, and UserError when no round has the columns that labels are computed from.
    """
    with session(debug) as out:
        store, run = open_run(uri)
        if objectives.are_swept(sets):
            sweep_objectives(out, store, run, sets, (rounds, sample), csv)
            return
        axes = read_grid(run, sets or list(PAPER))
        points = grid(run, axes)
        chosen = choose_rounds(store, run, rounds)
        for note in map(stale_note, chosen):
            if note is not None:
                out.say(note)
        if sample and run.model.tuning == "full":
            out.say(WHOLE)
        elif sample:
            contents.refuse_other(store, run)
        started = time.perf_counter()
        with late("sweep", f"{len(points)} points: {NOTICE_S:g} s so far, and not done. {SLOW}"):
            stored = read(run, chosen)
            loaded = time.perf_counter()
            figures = sweep(stored.signals, points)
            swept = time.perf_counter()
            cosine = gradient_cosines(stored, list(figures), sample) if sample and run.model.tuning == "lora" else {}
        clock = {"read": loaded - started, "sweep": swept - loaded, "gradient": time.perf_counter() - swept}
        document = summarise(stored, axes, figures, cosine, clock)
        again = " (in place of those of an earlier sweep)" if store.read_bytes(EVIDENCE) is not None else ""
        out.told.result = document
        show(document, out)  # first: a run that may only be read takes no file
        if csv is not None:
            write_csv(csv, document["points"])
        write_evidence(store, document)
        out.say(f"figures: {store.locate(EVIDENCE)}{again}")


def choose_gate(uri: str, sets: list[str], rounds: list[int] | None, sample: int, debug: bool, csv: str | None = None) -> None:
    """Print a proposal for gamma and window with its evidence, from an audit of one round, and write evidence/choice.json.

    sample: traces whose gradients are taken; 0: of each block of problems a minibatch at most.

    Raises SettingError for an axis that is none of these two, and for more than one round, and what `measure.measure` raises.
    """
    with session(debug) as out:
        store, run = open_run(uri)
        asked = choose.gates(run, read_grid(run, sets or list(choose.GRID)))
        if rounds is not None and len(rounds) > 1:
            raise SettingError("--choose reads one round", "--round", "Give one")
        [work, *_] = choose_rounds(store, run, rounds)
        contents.refuse_other(store, run)
        for note in (stale_note(work), sampling_note(run)):
            if note is not None:
                out.say(note)
        with late("sweep", f"{len(asked)} gates on round {work.number}: {NOTICE_S:g} s so far, and not done."):
            audit, _ = measure.measure(work, asked, measure.Plan(space=None, alone=False, sample=sample))
        document = choose.choose(audit, asked, _engine_seconds(store, work.number, audit["traces"]))
        out.told.result = document
        show_choice(document, out)
        if csv is not None:
            write_csv(csv, document["points"])
        store.write_json(choose.EVIDENCE, document)
        out.say(f"figures: {store.locate(choose.EVIDENCE)}")


def _engine_seconds(store: Store, number: int, traces: int) -> float | None:
    """Seconds that a round took to make and to score so many traces; None where its metrics do not tell it."""
    for row in store.metrics():
        if row["writer"] == "round" and row["round"] == number and row.get("num_rows") and is_timed(row):
            return float(row["seconds_measure"] * traces / row["num_rows"])
    return None


def show_choice(document: dict[str, Any], out: Session) -> None:
    """Print the gates and what is proposed."""
    part = "" if document["sample"] == document["traces"] else f"gradients of {document['sample']} of "
    size = f"{part}{document['traces']} traces of round {document['round']}, policy {document['policy']}"
    table = aligned(size, "gate", "averaged cosine", "against gamma 0")
    for point in document["points"]:
        gap = "-" if point["gap"] is None else "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**point["gap"])
        own = point[choose.FIGURE]
        table.add_row(point["gate"], "-" if own is None else "{value:.3f} [{low:.3f}, {high:.3f}]".format(**own), gap)
    out.console.print(table)
    for note in CHOICE_NOTES:
        out.console.print(note, style="dim", highlight=False)
    for sentence in choose.sentences(document):
        out.say(sentence)


def sweep_objectives(
    out: Session, store: Store, run: Run, sets: list[str], asked: tuple[list[int] | None, int], csv: str | None = None
) -> None:
    """Print effective tokens and gradient cosines of objectives on the stored traces, and write evidence/objectives.json.

    asked: rounds, and traces for the cosines. csv: a file for the figures.
    """
    rounds, sample = asked
    points = objectives.grid(run, sets)
    chosen = choose_rounds(store, run, rounds)
    contents.refuse_other(store, run)
    partly = [note for point in points for note in approximation(point.run.objective, run.score)]
    for note in dict.fromkeys([*filter(None, map(stale_note, chosen)), *partly]):
        out.say(note)
    with late("sweep", f"{len(points)} objectives: {NOTICE_S:g} s so far, and not done. Their gradients take most of it."):
        document = objectives.measure(run, points, chosen, sample)
    out.told.result = document
    axes = list(points[0].settings)
    title = f"{len(points)} objectives on {document['tokens']} tokens of {document['traces']} traces; cosines with the first"
    table = aligned(title, *(name.split(".")[1] for name in axes), "eff", "cosine", "by round", gap=1)
    for point in document["points"]:
        by_round = " ".join(_number(value, 3) for value in point["cosine"])
        cells = _number(point["effective_share"], 2), _number(point["cosine_mean"], 4), by_round
        table.add_row(*point["settings"].values(), *cells)
    out.console.print(table)
    out.console.print(OBJECTIVE_NOTE, style="dim", highlight=False)
    if csv is not None:
        write_csv(csv, document["points"])
    store.write_json(objectives.EVIDENCE, document)
    out.say(f"figures: {store.locate(objectives.EVIDENCE)}")


def show(document: dict[str, Any], out: Session) -> None:
    """Print the figures of evidence/sweep.json as tables."""
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


def _points_table(document: dict[str, Any], title: str) -> Table:
    """One row per point of the grid, in at most 80 columns of text."""
    axes = list(document["axes"])
    columns = [*(name.split(".")[1] for name in axes), "weight l m p f", "restored l m p f", "kept", "eff", "corr", "cosine"]
    table = aligned(title, *columns, gap=1)
    for point in document["points"]:
        table.add_row(
            *(f"{point['settings'][name]}" for name in axes),
            " ".join(_number(value, 2).rjust(4) for value in point["factors"]),
            " ".join(_number(value, 3, "+").replace("0.", ".", 1).rjust(5) for value in point["restored"]),
            *(_number(point[name], 2) for name in ("kept", "effective_share")),
            _number(point["correlation"], 2, "+"),
            _number(point["cosine_mean"], 4),
        )
    return table


def _shares_table(document: dict[str, Any]) -> Table:
    """Regime shares, one row for each combination of the settings that decide regimes."""
    decisive = [name for name in document["axes"] if name.startswith("profile.") or name == "label.min_normaliser"]
    columns = [*(name.split(".")[1] for name in decisive), *(f"{name}, %" for name in document["regimes"])]
    table = aligned("regimes, share of all tokens", *columns)
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


def _number(value: float | None, digits: int, sign: str = "") -> str:
    """A number with `digits` decimals, or "-" for None."""
    return "-" if value is None else f"{value:{sign}.{digits}f}"
