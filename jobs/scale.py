"""`egrsd scale`: show the engines of a live run, or change their number, from another terminal."""

from __future__ import annotations

import re

from rich.table import Column, Table

from jobs.opened import open_run
from jobs.screen.terminal import session
from pipeline.config import Run
from pipeline.errors import SettingError, nearest
from pipeline.live import control

_LIMIT = 100_000  # a larger number of engines is a typing mistake


def scale(uri: str, sizes: list[str], debug: bool) -> None:
    """Ask the driver of a run for other pool sizes such as `rollout=4` or `score=1..8`, and print its engines.

    Raises UserError for a run that is not alive, and SettingError for an unknown pool or a malformed size. Raises the driver's
    ResourceError when the cluster can never hold the engines.
    """
    with session(debug) as out:
        store, run = open_run(uri)
        wanted = parse(sizes, run)
        pools = control.ask(store, {"sizes": wanted})["pools"]
        out.told.result = pools
        for name, pool in pools.items():
            bounds = str(pool["least"]) if pool["least"] == pool["most"] else f"{pool['least']} to {pool['most']}"
            out.say(f"{name}: {len(pool['engines'])} engines, {bounds} wanted; {pool['queued']} batches wait.")
            if pool["engines"] or pool["gone"]:
                out.console.print(_table(pool))


def parse(sizes: list[str], run: Run) -> dict[str, tuple[int, int]]:
    """(least, most) engines of each pool, from words such as `rollout=2..8`. Raises SettingError for an unknown pool or size."""
    known = list(run.pools)
    wanted = {}
    for text in sizes:
        name, _, size = text.partition("=")
        parts = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", size)
        if parts is None:
            raise SettingError(f"{text!r} is no size", "egrsd scale", "Write POOL=N or POOL=LEAST..MOST: rollout=4, rollout=2..8")
        if name not in known:
            hint = nearest(name, known, f"This run's pools: {', '.join(known)}")
            raise SettingError(f"unknown pool '{name}'", "egrsd scale", hint)
        least, most = int(parts[1]), max(1, int(parts[1])) if parts[2] is None else int(parts[2])
        if least > most:
            raise SettingError(f"least {least} is above most {most}", f"{name}={size}", "Write the smaller number first")
        if not 1 <= most <= _LIMIT:
            raise SettingError(
                f"most {most} is not within 1 to {_LIMIT}", f"{name}={size}", "0..4 lets a pool be empty when idle"
            )
        wanted[name] = (least, most)
    return wanted


def _table(pool: control.Document) -> Table:
    columns = ("engine", "state", "process", "batches", "rows", "policy", "tokens/s", "for")
    table = Table(*(Column(name, no_wrap=True) for name in columns), box=None, padding=(0, 2, 0, 0))
    for engine in pool["engines"]:
        state = engine["state"] if engine["pid"] else "no node yet"
        counts = (str(engine[name]) for name in ("batches", "rows", "policy_version"))
        rate = f"{engine['tokens_per_s']:,.0f}"
        table.add_row(engine["name"], state, str(engine["pid"] or "-"), *counts, rate, _ago(engine["seconds"]))
    for name, _, seconds in pool["gone"]:
        table.add_row(name, "dead", "-", "-", "-", "-", "-", f"{_ago(seconds)} ago")
    return table


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
