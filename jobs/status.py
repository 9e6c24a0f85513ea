"""`egrsd status`: a table of rounds x stages, read off the run directory alone."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from jobs.session import Session, session
from pipeline import contract
from pipeline.config import Run
from pipeline.rounds import TRAINED_ON, Round, evaluation_run, open_round, open_rounds, why_stale
from pipeline.store import Entry, Store


def show(uri: str, debug: bool) -> None:
    """Rows, rejected by reason, stale shards and seconds of every stage of every round; policies and what they were made of."""
    store = Store(uri)
    with session(debug) as out:
        run = store.load_run()
        names = [stage.name for stage in contract.PLAN]
        rounds = store.numbers("rounds")
        table = Table(
            "round", *names, "trained", title=f"{run.name}: {len(rounds)} of {run.rounds} rounds", title_justify="left", box=None
        )
        rejected: Counter[str] = Counter()
        notes: list[str] = []
        for work in open_rounds(store, run):
            entries = {name: _planned(store, work, name) for name in names}
            rejected.update(_rejected(entries))
            stale = {name: _stale(work, name, entries[name]) for name in names}
            behind = f", {work.lag} behind" if work.lag else ""
            trained = _trained(work, entries, notes) + behind
            table.add_row(str(work.number), *(_cell(work, entries[name], stale[name]) for name in names), trained)
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


def _planned(store: Store, work: Round, name: str) -> dict[str, Entry]:
    """Entries of the shards that the round's plan names; others are left over from an earlier plan."""
    return {shard: entry for shard, entry in store.entries(work.area, name).items() if shard in work.shards}


def _stale_evaluations(store: Store, run: Run) -> list[str]:
    held_out, notes = evaluation_run(run), []
    for number in store.numbers("evals"):
        work = open_round(store, held_out, "evals", number)
        stale = {reason for name in ("prompts", "rollout", "grade") for reason in _stale(work, name, _planned(store, work, name))}
        notes += [f"stale: {work.area} ({', '.join(sorted(stale))}); `egrsd distill` evaluates again"] if stale else []
    return notes


def _cell(work: Round, entries: dict[str, Entry], stale: Counter[str]) -> str:
    """`256 1.2s`: rows and seconds of work; what is not as it should be stands behind it, and in words below the table."""
    if not entries:
        return "-"
    text = f"{sum(e.rows for e in entries.values())} {sum(e.seconds for e in entries.values()):.1f}s"
    if dropped := sum(sum(e.rejected.values()) for e in entries.values()):
        text += f" -{dropped}"
    return f"[yellow]{text} ![/yellow]" if stale or work.shards.keys() - entries.keys() else text


def _stale(work: Round, name: str, entries: dict[str, Entry]) -> Counter[str]:
    """Shards of a stage by the reason for which they would be computed again; those it never had are not counted."""
    shards = work.shards if entries else ()
    reasons = (why_stale(work, contract.STAGES[name], shard) for shard in shards)
    return Counter(reason for reason in reasons if reason is not None)


def _trained(work: Round, entries: dict[str, dict[str, Entry]], notes: list[str]) -> str:
    ready = work.store.ready(work.number)
    if ready is None:
        return "-"
    version = work.number + 1
    if not work.store.has_policy(version):
        return "committed"
    now = {shard: {name: entries[name][shard].sha256 for name in TRAINED_ON if shard in entries[name]} for shard in work.shards}
    if now == ready["shards"]:
        return f"policy {version}"
    notes.append(f"stale: policy {version} was trained on other shards of {work.area}; `egrsd train --from-round {work.number}`")
    return f"[yellow]policy {version} ![/yellow]"


def _rejected(entries: dict[str, dict[str, Entry]]) -> Counter[str]:
    """Rows of a round by reject_reason: traces, where the round has any, else prompts. Later stages carry a rejection on."""
    found = _by_reason(entries["rollout"] or entries["prompts"])
    for name in ("grade", "score"):
        found.update(_by_reason(entries[name]) - _by_reason(entries["rollout"]))
    return found


def _by_reason(entries: dict[str, Entry]) -> Counter[str]:
    total: Counter[str] = Counter()
    for entry in entries.values():
        total.update(entry.rejected)
    return total


def _say_rejected(rejected: Counter[str], out: Session) -> None:
    if rejected:
        out.say("rejected: " + ", ".join(f"{count} {reason}" for reason, count in rejected.most_common()))
    else:
        out.say("rejected: none")
