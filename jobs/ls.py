"""`egrsd ls`: list the runs under a folder, with recipe, rounds, accuracy, length, when and state."""

from __future__ import annotations

from dataclasses import asdict

from rich.markup import escape

from jobs.screen.tables import aligned
from jobs.screen.terminal import printable, session
from pipeline.inspection.learning import listed
from pipeline.notices import NOTICE_S, late


def list_runs(folder: str, debug: bool) -> None:
    """Print one row for each run. Raises UserError for a place that cannot be opened."""
    with session(debug) as out:
        with late("list", f"runs below {folder} have been looked for, for {NOTICE_S:g} s so far."):
            found = list(listed(folder))
        out.told.result = [asdict(one) for one in found]
        if not found:
            out.say(f"no run under {folder}. `egrsd distill --recipe demo --run {folder.rstrip('/')}/demo` begins one.")
            return
        table = aligned("", "run", "recipe", "rounds", "accuracy, %", "length", "changed (UTC)", "state")
        for one in found:
            accuracy = "-" if one.accuracy is None else f"{100 * one.accuracy:.1f}"
            length = "-" if one.length is None else f"{one.length:.1f}"
            cells = (one.uri, one.recipe, f"{one.rounds}/{one.of}", accuracy, length, one.when, one.state)
            table.add_row(*(escape(printable(cell)) for cell in cells))
        out.console.print(table)
        out.console.print("accuracy and length: training traces of the last round with figures", style="dim", highlight=False)
