"""`egrsd status`: a table of rounds x stages, read off the run directory alone."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from jobs.session import Session, session
from pipeline import contract
from pipeline.dataset import TRAINED_ON, Round, open_round, why_stale
from pipeline.store import Entry, Store


def show(uri: str, debug: bool) -> None:
    """Rows, rejected by reason, stale shards and seconds of every stage of every round; policies and what they were made of."""
    store = Store(uri)
    with session(debug) as out:
        run = store.load_run()
        names = [stage.name for stage in contract.PLAN]
        table = Table("round", *names, "trained", title=f"{store.uri}  ({run.name}, {run.rounds} rounds)", title_justify="left")
        rejected: Counter[str] = Counter()
        for number in store.numbers("rounds"):
            work = open_round(store, run, "rounds", number)
            entries = {name: store.entries(work.area, name) for name in names}
            rejected.update(_rejected(entries))
            table.add_row(str(number), *(_cell(work, name, entries[name]) for name in names), _trained(work, entries))
        out.console.print(table)
        _say_rejected(rejected, out)
        out.say(f"policies: 0 to {store.latest_policy()}. Evaluated: {', '.join(map(str, store.numbers('evals'))) or 'none'}.")


def _cell(work: Round, name: str, entries: dict[str, Entry]) -> str:
    if not entries:
        return "-"
    rows, seconds = sum(e.rows for e in entries.values()), sum(e.seconds for e in entries.values())
    text = f"{rows} rows {seconds:.1f} s"
    if dropped := sum(sum(e.rejected.values()) for e in entries.values()):
        text += f"\n{dropped} rejected"
    if missing := len(work.shards.keys() - entries.keys()):
        text += f"\n[yellow]{missing} shards missing[/yellow]"
    reasons = Counter(reason for shard in entries if (reason := why_stale(work, contract.STAGES[name], shard)) is not None)
    for reason, count in reasons.items():
        text += f"\n[yellow]{count} stale: {reason}[/yellow]"
    return text


def _trained(work: Round, entries: dict[str, dict[str, Entry]]) -> str:
    ready = work.store.ready(work.number)
    if ready is None:
        return "-"
    now = {shard: {name: entries[name][shard].sha256 for name in TRAINED_ON if shard in entries[name]} for shard in work.shards}
    if not work.store.has_policy(work.number + 1):
        return "committed"
    return (
        f"policy {work.number + 1}" if now == ready["shards"] else f"[yellow]policy {work.number + 1}, on other shards[/yellow]"
    )


def _rejected(entries: dict[str, dict[str, Entry]]) -> Counter[str]:
    """Rows of a round by reject_reason, each counted at the stage that rejected it: later stages only carry it on."""
    found: Counter[str] = Counter()
    for stage in contract.PLAN:
        before: Counter[str] = Counter()
        for name in contract.inputs(stage):
            before |= _by_reason(entries[name])
        found.update(_by_reason(entries[stage.name]) - before if stage.name != "rollout" else _by_reason(entries["rollout"]))
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
