"""`egrsd explain`: what a setting does, its type and default, and which stages a change of it makes stale."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from jobs.screen.terminal import session
from pipeline.inspection.explained import explain


def explain_settings(name: str, debug: bool) -> None:
    """Print one setting, or a table of a section. Raises SettingError for an unknown name."""
    with session(debug) as out:
        found = explain(name.strip())
        out.told.result = [asdict(one) for one in found]
        if len(found) > 1:
            table = Table("setting", "default", "meaning", box=None, padding=(0, 2, 0, 0))
            for one in found:
                table.add_row(one.name, one.default if len(one.default) <= 24 else f"{one.default[:21]}...", one.meaning)
            out.console.print(table, markup=False, soft_wrap=False)
            return
        [one] = found
        out.say(f"{one.name}: {one.meaning}.")
        out.say(f"type     {one.kind}")
        out.say(f"default  {one.default or 'none: it must be given'}")
        out.say(f"stale    after a change: {one.stale}")
