"""`egrsd status`: a table of rounds x stages, read off the run directory alone."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from jobs.terminal import Session, session
from pipeline.config import Run
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import evaluation_run, open_round, open_rounds
from pipeline.stages import MEASURE, PLAN
from pipeline.store import lease
from pipeline.store.directory import Entry, Store
from pipeline.store.files import SCRATCH


def show(uri: str, debug: bool) -> None:
    """Rows, rejected by reason, stale shards and seconds of every stage of every round; policies and what they were made of."""
    with session(debug) as out:
        store = Store(uri)
        run = store.load_run()
        names = [stage.name for stage in PLAN]
        rounds = store.numbers("rounds")
        table = Table(
            "round", *names, "trained", title=f"{run.name}: {len(rounds)} of {run.rounds} rounds", title_justify="left", box=None
        )
        rejected: Counter[str] = Counter()
        notes: list[str] = []
        for work in open_rounds(store, run):
            seen = Inventory(work)
            rejected.update(_rejected(seen))
            stale = {name: _stale(seen, name) for name in names}
            behind = f", {work.lag} behind" if work.lag else ""
            trained = _trained(seen, notes) + behind
            table.add_row(str(work.number), *(_cell(seen, name, stale[name]) for name in names), trained)
            notes += [
                f"stale: {work.area} {name}, {count} of {len(work.shards)} shards ({reason})"
                for name in names
                for reason, count in stale[name].items()
            ]
        out.console.print(table)
        out.console.print("rows, seconds of work, -rejected rows, ! stale or missing shards", style="dim")
        if run.evaluation.problems:
            notes += _stale_evaluations(store, run)
        for note in notes:
            out.say(note)
        _say_rejected(rejected, out)
        out.say(f"policies: 0 to {store.latest_policy()}. Evaluated: {', '.join(map(str, store.numbers('evals'))) or 'none'}.")
        for name in store.names("evals"):
            if not name.isdigit() and name not in (SCRATCH, lease.LEASE) and (policies := store.numbers(f"evals/{name}")):
                out.say(f"evals/{name}: policies {', '.join(map(str, policies))}")


def _stale_evaluations(store: Store, run: Run) -> list[str]:
    held_out, notes = evaluation_run(run), []
    for number in store.numbers("evals"):
        seen = Inventory(open_round(store, held_out, "evals", number))
        stale = {reason for name in ("prompts", "rollout", "grade") for reason in _stale(seen, name)}
        where = seen.work.area
        notes += [f"stale: {where} ({', '.join(sorted(stale))}); `egrsd distill` evaluates again"] if stale else []
    return notes


def _cell(seen: Inventory, name: str, stale: Counter[str]) -> str:
    """`256 1.2s`: rows and seconds of work; what is not as it should be stands behind it, and in words below the table."""
    entries = seen.entries(name)
    if not entries:
        return "-"
    text = f"{sum(e.rows for e in entries.values())} {sum(e.seconds for e in entries.values()):.1f}s"
    if dropped := _by_reason(entries).total():
        text += f" -{dropped}"
    return f"[yellow]{text} ![/yellow]" if stale else text


def _stale(seen: Inventory, name: str) -> Counter[str]:
    """Shards of a stage by the reason for which they would be computed again; those of a stage not begun are not counted."""
    return seen.reasons(name) if seen.entries(name) else Counter()


def _trained(seen: Inventory, notes: list[str]) -> str:
    work = seen.work
    ready = work.store.ready(work.number)
    if ready is None:
        return "-"
    version = work.number + 1
    if not work.store.has_policy(version):
        return "committed"
    entries = {name: seen.entries(name) for name in MEASURE}
    now = {shard: {name: entries[name][shard].sha256 for name in MEASURE if shard in entries[name]} for shard in work.shards}
    if now == ready["shards"]:
        return f"policy {version}"
    notes.append(f"stale: policy {version} was trained on other shards of {work.area}; `egrsd train --from-round {work.number}`")
    return f"[yellow]policy {version} ![/yellow]"


def _rejected(seen: Inventory) -> Counter[str]:
    """Rows of a round by reject_reason: traces, where the round has any, else prompts. Later stages carry a rejection on."""
    rollout = _by_reason(seen.entries("rollout"))
    found = rollout.copy() if seen.entries("rollout") else _by_reason(seen.entries("prompts"))
    for name in ("grade", "score"):
        found.update(_by_reason(seen.entries(name)) - rollout)
    return found


def _by_reason(entries: dict[str, Entry]) -> Counter[str]:
    total: Counter[str] = Counter()
    for entry in entries.values():
        if entry.rejected:
            total.update(entry.rejected)
    return total


def _say_rejected(rejected: Counter[str], out: Session) -> None:
    if rejected:
        out.say("rejected: " + ", ".join(f"{count} {reason}" for reason, count in rejected.most_common()))
    else:
        out.say("rejected: none")
