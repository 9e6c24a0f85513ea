"""`egrsd status`: print a table of rounds x stages, read from the run directory alone."""

from __future__ import annotations

from collections import Counter

from rich.filesize import decimal
from rich.table import Table

from jobs.opened import open_run
from jobs.terminal import session
from pipeline.choice.plans import told
from pipeline.config import Run
from pipeline.notices import NOTICE_S, late
from pipeline.rounds import origin
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.metrics import agreement
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import evaluation_run, open_round, open_rounds
from pipeline.stages import EVALUATION, PLAN, chain_of
from pipeline.store.directory import Store
from pipeline.store.names import EVALUATION_FOLDER


def show(uri: str, debug: bool) -> None:
    """Print rows, seconds and stale shards of each stage of each round, rejected rows by reason, policies and evaluations."""
    with session(debug) as out:
        store, run = open_run(uri)
        title = f"{run.name}: {len(store.numbers('rounds'))} of {run.rounds} rounds"
        names = chain_of(run, (stage.name for stage in PLAN))
        table = Table("round", *names, "trained", title=title, title_justify="left", box=None)
        rejected: Counter[str] = Counter()
        stored: Counter[str] = Counter()
        notes: list[str] = []
        with late("status", f"the rounds of {store.uri} have been read for {NOTICE_S:g} s so far."):
            for work in open_rounds(store, run):
                inventory = Inventory(work)
                rejected.update(inventory.all_rejected())
                stored.update({name: sum(entry.bytes for entry in inventory.entries(name).values()) for name in names})
                stale = {name: inventory.begun_and_stale(name) for name in names}
                table.add_row(str(work.number), *(_cell(inventory, name, stale[name]) for name in names), _trained(inventory))
                notes += _notes(inventory, stale)
        out.console.print(table)
        out.console.print("rows, seconds of work, -rejected rows, ! stale or missing shards", style="dim")
        changed = [f"note: {text}." for text in origin.look(store, run)]
        for note in [*notes, *_stale_evaluations(store, run), *told(store, run), *changed]:
            out.say(note)
        if run.source.response:
            wrote = (
                "no engine wrote them"
                if run.only_imports
                else f"{run.writers.count('import')} of each group of {len(run.writers)}"
            )
            out.say(f"traces: imported from {run.source.uri}, column {run.source.response}; {wrote}")
        if run.teachers:
            who = {name: teacher.server or teacher.model or f"policy {teacher.policy}" for name, teacher in run.teachers.items()}
            out.say("teachers: " + ", ".join(f"{name} ({where}, {run.teachers[name].prompt})" for name, where in who.items()))
        out.say("rejected: " + (", ".join(f"{count} {reason}" for reason, count in rejected.most_common()) or "none"))
        out.say("stored: " + (", ".join(f"{name} {decimal(size)}" for name, size in stored.items() if size) or "nothing"))
        if (gap := agreement(store.metrics())) is not None:
            out.say(f"trainer - engine: {gap}")
        if (damage := store.damaged_policy()) is not None:
            out.say(f"damaged: {damage}")
        out.say(f"policies: 0 to {store.latest_policy()}. Evaluated: {', '.join(map(str, store.numbers('evals'))) or 'none'}.")
        for name in store.named("evals", EVALUATION_FOLDER):
            if policies := store.numbers(f"evals/{name[0]}"):
                out.say(f"evals/{name[0]}: policies {', '.join(map(str, policies))}")


def _cell(inventory: Inventory, name: str, stale: Counter[str]) -> str:
    """A cell such as `256 1.2s -3 !`: rows, seconds of work, rejected rows, and a mark for stale or missing shards."""
    entries = inventory.entries(name)
    if not entries:
        return "-"
    text = f"{sum(e.rows for e in entries.values())} {sum(e.seconds for e in entries.values()):.1f}s"
    if dropped := inventory.rejected(name).total():
        text += f" -{dropped}"
    return f"[yellow]{text} ![/yellow]" if stale else text


def _trained(inventory: Inventory) -> str:
    """Which policy was trained on a round, and how many rounds the policy that wrote its traces is behind."""
    work = inventory.work
    behind = f", {work.lag} behind" if work.lag else ""
    as_committed = inventory.as_committed
    if as_committed is None:
        return f"-{behind}"
    if not work.store.has_policy(work.number + 1):
        return f"committed{behind}"
    text = f"policy {work.number + 1}"
    return f"{text if as_committed else f'[yellow]{text} ![/yellow]'}{behind}"


def _notes(inventory: Inventory, stale: dict[str, Counter[str]]) -> list[str]:
    """Sentences on what is stale in a round, and on entropies that are not what the run asks for."""
    work, notes = inventory.work, []
    if (text := inventory.warning()) is not None:
        notes.append(f"warning: {text}")
    if fell_back := sum(entry.facts.get("fell_back", 0) for entry in inventory.entries("score").values()):
        notes.append(f"note: {work.area}: {fell_back} traces had no sibling or verdict, and got teachers.NAME.fallback instead")
    if inventory.as_committed is False and work.store.has_policy(work.number + 1):
        redo = f"`egrsd train --from-round {work.number} --replace`"
        notes.append(f"stale: policy {work.number + 1} was trained on other shards of {work.area}; {redo}")
    return notes + [
        f"stale: {work.area} {name}, {count} of {len(work.shards)} shards ({reason})"
        for name, reasons in stale.items()
        for reason, count in reasons.items()
    ]


def _stale_evaluations(store: Store, run: Run) -> list[str]:
    """Sentences on stale evaluations of the run's own held-out problems."""
    notes = []
    for number in store.numbers("evals") if run.evaluation.problems else []:
        if read_plan(store, "evals", number) is None:  # an empty folder
            continue
        inventory = Inventory(open_round(store, evaluation_run(run), "evals", number))
        stale = {reason for name in chain_of(inventory.work.run, EVALUATION) for reason in inventory.begun_and_stale(name)}
        where = inventory.work.area
        notes += [f"stale: {where} ({', '.join(sorted(stale))}); `egrsd distill` evaluates again"] if stale else []
    return notes
