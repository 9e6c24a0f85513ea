"""The settings of a verb: a recipe, a configuration file and `--set`, laid over one another, or those of a run that was begun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Run
from pipeline.errors import SettingError, SourceError
from pipeline.overrides import decides, differences, resolve
from pipeline.recipes import recipe as named
from pipeline.store.directory import Store


@dataclass(frozen=True)
class Choices:
    """What a command line says of settings: a recipe, `--set` lines, a file for `--config`, and whether to go on with others."""

    recipe: str | None = None
    sets: Sequence[str] = ()
    config: str | None = None
    accept_changes: bool = False


def settle(store: Store, choices: Choices) -> Run:
    """The configuration to run with: the run's own if it was started, else the recipe's, with file and overrides laid over.

    Raises SettingError that lists the settings which differ from those the run was made with.
    """
    recipe, sets = choices.recipe, list(choices.sets)
    document = read_config(choices.config) if choices.config else {}
    old = store.load_run() if store.exists() else None
    if old is None and recipe is None:
        raise SettingError("a new run needs a recipe", "--recipe", "`egrsd recipes` lists them")
    begun = bool(store.numbers("rounds") or store.numbers("evals"))  # before that, nothing was made with the old settings
    if old is None or (recipe is not None and not begun):
        return resolve(named(recipe or ""), sets, document)
    if recipe is not None and resolve(named(recipe), sets, document).name != old.name:
        raise SettingError(f"this run was started from recipe '{old.name}'", "--recipe", "Leave it out, or use another --run")
    run = resolve(old, sets, document)  # run.json is the truth, also where a recipe or a stage's settings changed since
    changed = [difference for difference in differences(old, run) if decides(difference[0])]
    if begun and changed and not choices.accept_changes:
        listed = ", ".join(f"{name} was {was!r}, now {now!r}" for name, was, now in changed[:8])
        more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
        raise SettingError(
            f"this run was made with other settings: {listed}{more}",
            store.uri,
            "Leave them out to resume as it was, use another --run, or pass --accept-changes",
        )
    return run


def read_config(path: str) -> dict[str, Any]:
    """The settings of a `--config` file. Raises SourceError or SettingError where it holds none."""
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read the configuration ({error})", path, "Check the path given to --config") from error
    except yaml.YAMLError as error:
        raise SettingError(f"is not YAML: {' '.join(str(error).split())}", path, "Check the line it names") from error
    if not isinstance(document, dict):
        raise SettingError("holds no settings", path, "Write `section: {setting: value}`, as `egrsd recipes --show NAME` prints")
    return document


def parse_numbers(text: str, option: str, example: str) -> list[int]:
    """Numbers of `0,2,5` or `0..4`, mixed as one likes. Raises SettingError that shows how it is written."""
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        if not (first.isdecimal() and first.isascii() and (not dots or (last.isdecimal() and last.isascii()))):
            raise SettingError(f"'{part.strip()}' is no number or range of numbers", f"{option} {text}", f"Write it as {example}")
        start, end = int(first), int(last or first)
        if end < start or end - start >= 10_000:
            raise SettingError(f"{part.strip()} holds nothing, or too much", f"{option} {text}", f"Write it as {example}")
        found += range(start, end + 1)
    return found
