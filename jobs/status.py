"""`egrsd status`: a table of rounds x stages, read off the run directory alone."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from jobs.opened import open_run
from jobs.terminal import session
from pipeline.config import Run
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import evaluation_run, open_round, open_rounds
from pipeline.stages import EVALUATION, PLAN
from pipeline.store.directory import Store
from pipeline.store.files import SCRATCH
from pipeline.store.lease import LEASE

NAMES = [stage.name for stage in PLAN]


def show(uri: str, debug: bool) -> None:
    """Rows, rejected by reason, stale shards and seconds of every stage of every round; policies and what they were made of."""
    with session(debug) as out:
        store, run = open_run(uri)
        title = f"{run.name}: {len(store.numbers('rounds'))} of {run.rounds} rounds"
        table = Table("round", *NAMES, "trained", title=title, title_justify="left", box=None)
        rejected: Counter[str] = Counter()
        notes: list[str] = []
        for work in open_rounds(store, run):
            seen = Inventory(work)
            rejected.update(seen.all_rejected())
            stale = {name: seen.begun_and_stale(name) for name in NAMES}
            table.add_row(str(work.number), *(_cell(seen, name, stale[name]) for name in NAMES), _trained(seen))
            notes += _notes(seen, stale)
        out.console.print(table)
        out.console.print("rows, seconds of work, -rejected rows, ! stale or missing shards", style="dim")
        for note in [*notes, *_stale_evaluations(store, run)]:
            out.say(note)
        out.say("rejected: " + (", ".join(f"{count} {reason}" for reason, count in rejected.most_common()) or "none"))
        out.say(f"policies: 0 to {store.latest_policy()}. Evaluated: {', '.join(map(str, store.numbers('evals'))) or 'none'}.")
        for name in store.names("evals"):
            if not name.isdigit() and name not in (SCRATCH, LEASE) and (policies := store.numbers(f"evals/{name}")):
                out.say(f"evals/{name}: policies {', '.join(map(str, policies))}")


def _cell(seen: Inventory, name: str, stale: Counter[str]) -> str:
    """`256 1.2s`: rows and seconds of work; what is not as it should be stands behind it, and in words below the table."""
    entries = seen.entries(name)
    if not entries:
        return "-"
    text = f"{sum(e.rows for e in entries.values())} {sum(e.seconds for e in entries.values()):.1f}s"
    if dropped := seen.rejected(name).total():
        text += f" -{dropped}"
    return f"[yellow]{text} ![/yellow]" if stale else text


def _trained(seen: Inventory) -> str:
    """Which policy was made of a round, and by how many rounds the one that answered is behind."""
    work = seen.work
    behind = f", {work.lag} behind" if work.lag else ""
    as_committed = seen.as_committed
    if as_committed is None:
        return f"-{behind}"
    if not work.store.has_policy(work.number + 1):
        return f"committed{behind}"
    text = f"policy {work.number + 1}"
    return f"{text if as_committed else f'[yellow]{text} ![/yellow]'}{behind}"


def _notes(seen: Inventory, stale: dict[str, Counter[str]]) -> list[str]:
    """What of a round is stale, in words."""
    work, notes = seen.work, []
    if seen.as_committed is False and work.store.has_policy(work.number + 1):
        redo = f"`egrsd train --from-round {work.number}`"
        notes.append(f"stale: policy {work.number + 1} was trained on other shards of {work.area}; {redo}")
    return notes + [
        f"stale: {work.area} {name}, {count} of {len(work.shards)} shards ({reason})"
        for name, reasons in stale.items()
        for reason, count in reasons.items()
    ]


def _stale_evaluations(store: Store, run: Run) -> list[str]:
    """What of the evaluations of the run's own held-out problems is stale, in words."""
    notes = []
    for number in store.numbers("evals") if run.evaluation.problems else []:
        seen = Inventory(open_round(store, evaluation_run(run), "evals", number))
        stale = {reason for name in EVALUATION for reason in seen.begun_and_stale(name)}
        where = seen.work.area
        notes += [f"stale: {where} ({', '.join(sorted(stale))}); `egrsd distill` evaluates again"] if stale else []
    return notes
