"""`egrsd recipes`: list the recipes, or print one with all its settings."""

from __future__ import annotations

from rich.table import Table

from jobs.terminal import session
from pipeline.recipes import descriptions, recipe


def show_recipes(name: str | None, debug: bool) -> None:
    """List the recipes with their descriptions, or print one as YAML for `--config`. Raises SettingError for an unknown name."""
    with session(debug) as out:
        if name is not None:
            out.console.print(recipe(name).to_yaml(), markup=False, highlight=False, end="")
            return
        table = Table("recipe", "what it is", box=None)
        for key, text in descriptions().items():
            table.add_row(key, text)
        out.console.print(table)
