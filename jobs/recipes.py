"""`egrsd recipes`: list the recipes, or print one with all its settings."""

from __future__ import annotations

from rich.table import Table

from jobs.screen.terminal import session
from jobs.settle import Choices
from pipeline.recipes import descriptions


def show_recipes(name: str | None, sets: list[str], config: str | None, debug: bool) -> None:
    """List the recipes with their descriptions, or print one as YAML for `--config`, changed by `config` and `sets`.

    Raises SettingError for an unknown name, and for a wrong setting.
    """
    with session(debug) as out:
        if name is not None or config is not None:
            run = Choices(name, sets, config).fresh()
            out.told.result = run.model_dump(mode="json")
            out.console.print(run.to_yaml(), markup=False, highlight=False, end="")
            return
        out.told.result = descriptions()
        table = Table("recipe", "what it is", box=None)
        for key, text in descriptions().items():
            table.add_row(key, text)
        out.console.print(table)
