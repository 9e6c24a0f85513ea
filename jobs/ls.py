"""`egrsd ls`: list the runs under a folder, with recipe, rounds, accuracy, length, when and state."""

from __future__ import annotations

from dataclasses import asdict

from rich.markup import escape
from rich.table import Column

from jobs.opened import open_folder
from jobs.screen.tables import aligned
from jobs.screen.terminal import printable, session
from pipeline.errors import command
from pipeline.inspection.learning import listed
from pipeline.notices import NOTICE_S, late

_MOST = 4  # folders that a message names


def below(folder: str, uri: str) -> str:
    """The name of a run from a folder: `a/demo`, or its own last name when it is that folder."""
    root = open_folder(folder).uri.rstrip("/")
    return uri.removeprefix(f"{root}/") if uri != root else uri.rpartition("/")[2]


def list_runs(folder: str, debug: bool) -> None:
    """Print one row for each run. A line names folders that may not be read. Raises UserError for a place that cannot be read."""
    with session(debug) as out:
        with late("list", f"runs below {folder} have been looked for, for {NOTICE_S:g} s so far."):
            passed: list[str] = []
            found = list(listed(folder, passed.append))
        out.told.result = [asdict(one) for one in found]
        if passed:
            more = f" and {len(passed) - _MOST} more" if len(passed) > _MOST else ""
            out.say(f"passed over, since they may not be read: {', '.join(passed[:_MOST])}{more}.")
        if not found:
            begin = command("distill", "--recipe", "demo", "--run", f"{folder.rstrip('/')}/demo")
            out.say(f"no run under {folder}. {begin} begins one.")
            return
        names = [one.uri for one in found]
        if max(map(len, names)) > out.console.width // 2:
            names = [below(folder, name) for name in names]
        name = Column("run", overflow="fold", min_width=max(map(len, names)))  # the name tells runs apart: it is never cut
        table = aligned("", name, "name", "rounds", "accuracy, %", "length", "changed (UTC)", "state")
        for shown, one in zip(names, found, strict=True):
            accuracy = "-" if one.accuracy is None else f"{100 * one.accuracy:.1f}"
            accuracy = accuracy if one.base is None else f"base {100 * one.base:.1f}"
            length = "-" if one.length is None else f"{one.length:.1f}"
            cells = (shown, one.recipe, f"{one.rounds}/{one.of}", accuracy, length, one.when, one.state)
            table.add_row(*(escape(printable(cell)) for cell in cells))
        out.console.print(table)
        of_base = "; base: held-out problems before it" if any(one.base is not None for one in found) else ""
        if names[0] != found[0].uri:
            out.console.print(f"runs are named from {folder}", style="dim", markup=False, highlight=False)
        measured = f"training traces of the last round with figures{of_base}"
        out.console.print(f"accuracy and length: {measured}", style="dim", highlight=False)
