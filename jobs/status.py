"""`egrsd status`: what a run has learned, its work by round and stage, and what is stale with the command that mends it.

Everything is read from the run directory alone. Of the shards only the verdicts of evaluations are opened.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from textwrap import shorten
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.opened import open_run
from jobs.screen.progress import TO_THE_LOG
from jobs.screen.tables import aligned
from jobs.screen.terminal import Interrupted, Session, printable, session, with_address
from pipeline.choice.plans import told
from pipeline.config import Run
from pipeline.errors import StoreError, command
from pipeline.inspection import learning
from pipeline.inspection.ended import last_error
from pipeline.inspection.staleness import Staleness, among, look
from pipeline.notices import NOTICE_S, late
from pipeline.rounds import origin
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.metrics import agreement
from pipeline.rounds.round import open_rounds
from pipeline.rounds.tally import Tally, tallies
from pipeline.stages import PLAN, chain_of
from pipeline.store.directory import Store
from pipeline.store.names import EVALUATION_FOLDER

LOOK_S = 2.0
_WIDEST_ERROR = 400  # characters
CELLS = (
    "cells: rows, seconds, -rejected rows where their number changes; ! something in the round is stale. "
    "Seconds are summed over shards: two shards that wait for one engine count its time twice."
)


@dataclass
class Seen:
    """What `status` has read of a run. rows: of the table of work. notes: (kind of note, its text, rounds)."""

    store: Store
    run: Run
    figures: dict[str, dict[int, float]]
    stages: tuple[str, ...]
    stale: Staleness
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    notes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    evaluated: list[Tally] = field(default_factory=list)


def show(uri: str, debug: bool, watch: bool = False) -> None:
    """Print what was learned, the work, and what is stale. With `watch` again at each change, until the run is done."""
    with session(debug) as out:
        store, run = open_run(uri)
        if watch:
            _watch(out, store)
            return
        with late("status", f"the rounds of {store.uri} have been read for {NOTICE_S:g} s so far."):
            seen = see(store, run)
        for table in _tables(seen):
            out.console.print(table)
        for line in _lines(seen):
            out.say(line)
        out.told.result = _document(seen)


def see(store: Store, run: Run) -> Seen:
    """Read what is shown of a run."""
    seen = Seen(store, run, learning.by_round(store), chain_of(run, (stage.name for stage in PLAN)), Staleness(store, run))
    inventories = []
    for work in open_rounds(store, run):
        inventory = Inventory(work)
        inventories.append(inventory)
        seen.rejected.update(inventory.all_rejected())
        seen.rows.append(_row(inventory, seen.stages, Staleness(store, run).add(inventory)))
        seen.stored.update({name: sum(e.bytes for e in inventory.entries(name).values()) for name in seen.stages})
        for text in _notes(inventory):
            seen.notes[text].append(work.number)
    seen.stale = look(store, run, inventories)
    try:
        seen.evaluated += tallies(store, run)
    except StoreError as error:
        seen.notes[f"damaged: {error}"] = []
    return seen


def _row(inventory: Inventory, stages: tuple[str, ...], stale: bool) -> dict[str, Any]:
    """The work of one round: rows, seconds and rejected rows of each stage, and what was trained on it."""
    work = inventory.work
    cells = {}
    for name in stages:
        entries = inventory.entries(name).values()
        if entries:
            cells[name] = {
                "rows": sum(entry.rows for entry in entries),
                "seconds": sum(entry.seconds for entry in entries),
                "rejected": inventory.rejected(name).total(),
            }
    trained = inventory.as_committed is not None and work.store.has_policy(work.number + 1)
    state = f"policy {work.number + 1}" if trained else "committed" if inventory.as_committed is not None else "-"
    return {"round": work.number, "stages": cells, "trained": state, "behind": work.lag, "stale": stale}


def _notes(inventory: Inventory) -> Iterator[str]:
    """Sentences on entropies that are not what the run asks for, and on teachers that fell back, without the round."""
    work = inventory.work
    if (text := inventory.warning()) is not None:
        yield f"warning: {text.replace(f'{work.area}, ', '', 1)}"
    if fell_back := sum(entry.facts.get("fell_back", 0) for entry in inventory.entries("score").values()):
        yield f"note: {fell_back} traces had no sibling or verdict, and got teachers.NAME.fallback instead"


# ---- what is shown -----------------------------------------------------------------------------------------------------


def _tables(seen: Seen) -> list[RenderableType]:
    """The table of learning, where there are figures, then that of work."""
    title = f"{seen.run.name}: {seen.store.latest_policy()} of {seen.run.rounds} rounds trained"
    known = [(measure, seen.figures[measure[1]]) for measure in learning.MEASURES if seen.figures[measure[1]]]
    tables: list[RenderableType] = []
    if known:
        first, last = min(known[0][1]), max(known[0][1])
        table = aligned(title, "learning", f"round {first}", f"round {last}", "by round")
        for (_, _, label, scale, digits), values in known:
            ends = (f"{scale * values[number]:.{digits}f}" if number in values else "-" for number in (first, last))
            table.add_row(label, *ends, learning.sparkline([values[number] for number in sorted(values)]))
        tables += [table, Text()]
    return [*tables, _work(seen, "work" if known else title)]


def _work(seen: Seen, title: str) -> Table:
    """Rounds x stages. Neighbouring rounds that are whole and trained share one row."""
    table = aligned(title, "round", *seen.stages, "trained", gap=1)
    whole: list[dict[str, Any]] = []
    for row in [*seen.rows, None]:
        if row is not None and not row["stale"] and row["trained"].startswith("policy") and len(seen.rows) > 12:
            whole.append(row)
            continue
        if whole:
            table.add_row(*_together(whole, seen.stages))
            whole = []
        if row is not None:
            behind = f", {row['behind']} behind" if row["behind"] else ""
            marked = f"[yellow]{row['trained']} ![/yellow]" if row["stale"] else row["trained"]
            table.add_row(str(row["round"]), *_cells(row["stages"], seen.stages), f"{marked}{behind}")
    return table


def _together(rows: list[dict[str, Any]], stages: tuple[str, ...]) -> list[str]:
    """One row for several whole rounds, with sums."""
    sums = {name: Counter[str]() for name in stages}
    for row in rows:
        for name, cell in row["stages"].items():
            sums[name].update(cell)
    numbers = [row["round"] for row in rows]
    lag = max(row["behind"] for row in rows)
    last = f"policy {numbers[-1] + 1}" + (f", {lag} behind" if lag else "")
    return [among(numbers, "round").partition(" ")[2], *_cells(sums, stages), last]


def _cells(found: Mapping[str, Any], stages: tuple[str, ...]) -> Iterator[str]:
    """The cells of a row. Later stages pass rejected rows by, so their number stands only at the stage that changes it."""
    before = 0
    for name in stages:
        cell = found.get(name)
        known, before = before, cell["rejected"] if cell else before
        yield _cell({**cell, "rejected": before if before != known else 0}) if cell else "-"


def _cell(cell: Mapping[str, Any]) -> str:
    """A cell such as `256 1.2s -3`: rows, seconds of work, and rejected rows."""
    return f"{cell['rows']} {_span(cell['seconds'])}" + (f" -{cell['rejected']}" if cell["rejected"] else "")


def _span(seconds: float) -> str:
    """A time in few characters, so that eight columns fit into 80: `1.2s`, `461s`, `3.4h`."""
    return f"{seconds:.1f}s" if seconds < 99.95 else f"{seconds:.0f}s" if seconds < 9999.5 else f"{seconds / 3600:.1f}h"


def _lines(seen: Seen) -> list[str]:
    """The lines under the tables: notes, what is stale, and where things are."""
    store, run = seen.store, seen.run
    lines = [CELLS] if seen.rows else []
    lines += [f"{text} ({among(numbers, 'round')})" if numbers else text for text, numbers in seen.notes.items()]
    lines += [*told(store, run), *(f"note: {text}." for text in origin.look(store, run))]
    if run.source.response:
        some = f"{run.writers.count('import')} of each group of {len(run.writers)}"
        wrote = "no engine wrote them" if run.only_imports else some
        lines.append(f"traces: imported from {run.source.uri}, column {run.source.response}; {wrote}")
    if run.teachers:
        who = {name: teacher.server or teacher.model or f"policy {teacher.policy}" for name, teacher in run.teachers.items()}
        lines.append("teachers: " + ", ".join(f"{name} ({where}, {run.teachers[name].prompt})" for name, where in who.items()))
    lines.append("rejected: " + (", ".join(f"{count} {reason}" for reason, count in seen.rejected.most_common()) or "none"))
    lines.append("stored: " + (", ".join(f"{name} {decimal(size)}" for name, size in seen.stored.items() if size) or "nothing"))
    if (gap := agreement(store.metrics())) is not None:
        lines.append(f"trainer - engine: {gap}")
    if (damage := store.damaged_policy()) is not None:
        lines.append(f"damaged: {damage}")
    range_of = f"0 to {store.latest_policy()}" if store.latest_policy() else "policy 0 alone, the base"
    evaluated = ", ".join(f"policy {one.policy}" for one in seen.evaluated) or "none yet"
    lines.append(f"policies: {range_of}. Evaluated: {evaluated}.")
    lines += [f"held-out problems, {one.line()}" for one in seen.evaluated]
    for name in store.named("evals", EVALUATION_FOLDER):
        if policies := store.numbers(f"evals/{name[0]}"):
            lines.append(f"evals/{name[0]}: policies {', '.join(map(str, policies))}")
    return [*lines, *seen.stale.lines(), *_ending(store, run)]


def _ending(store: Store, run: Run) -> Iterator[str]:
    """Why the last command on a run with rounds to train ended, and the command that goes on."""
    error = last_error(store) if store.latest_policy() < run.rounds else None
    if error is not None:
        yield f"the last command ended: {shorten(error, _WIDEST_ERROR, placeholder=' ...')}"
        yield f"{command('distill', '--run', store.uri)} goes on."


def _document(seen: Seen) -> dict[str, Any]:
    """What `--json` prints of a run."""
    return {
        "run": seen.store.uri,
        "recipe": seen.run.name,
        "rounds": seen.run.rounds,
        "trained": seen.store.latest_policy(),
        "learning": seen.figures,
        "work": seen.rows,
        "rejected": seen.rejected,
        "stored_bytes": seen.stored,
        "evaluated": seen.store.numbers("evals"),
        "evaluations": [{"accuracy": one.accuracy, "answers": one.answers} | asdict(one) for one in seen.evaluated],
        "stale": [line.removeprefix("stale: ") for line in seen.stale.lines() if line.startswith("stale: ")],
        "mend": [one.strip("`") for one in seen.stale.remedies()],
    }


def _watch(out: Session, store: Store) -> None:
    """Show the run again every LOOK_S seconds until it is done. Ctrl-C ends the watch, not the run."""

    def page() -> tuple[RenderableType, bool]:
        """What is shown now, and whether the run is done."""
        run = store.load_run()
        seen = see(store, run)
        out.told.result = _document(seen)
        lines = [Text(printable(with_address(line))) for line in _lines(seen)]
        return Group(*_tables(seen), *lines), store.latest_policy() >= run.rounds

    shown, is_done = page()
    with Live(shown, console=out.console, auto_refresh=False, transient=False, **TO_THE_LOG) as live:
        try:
            while not is_done:
                time.sleep(LOOK_S)
                shown, is_done = page()
                live.update(shown, refresh=True)
        except Interrupted:
            return
