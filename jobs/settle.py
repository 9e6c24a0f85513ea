"""The settings of a verb: those of its run or of a recipe, changed by a configuration file and then by `--set`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Run
from pipeline.errors import SettingError, SourceError, UserError
from pipeline.models.layers import with_targets
from pipeline.overrides import decides, differences, refuse_unread_objective, resolve
from pipeline.recipes import recipe as named
from pipeline.store.directory import Store
from pipeline.written import read_document


@dataclass(frozen=True)
class Choices:
    """The options that choose settings: `--recipe`, `--set` lines, the `--config` file and `--accept-changes`.

    dry: whether the verb only says what it would do (`--dry-run`).
    """

    recipe: str | None = None
    sets: Sequence[str] = ()
    config: str | None = None
    accept_changes: bool = False
    dry: bool = False

    def fresh(self) -> Run:
        """The settings of a new run: those of the recipe, or else the defaults, with the file and `--set` over them.

        Raises SettingError when neither a recipe nor a file is given.
        """
        if self.recipe is None and self.config is None:
            remedy = "Give --recipe NAME (`egrsd recipes` lists them), or --config FILE (`egrsd init` writes one)"
            raise SettingError("a new run needs a recipe or a settings file", "--recipe", remedy)
        document = read_config(self.config) if self.config else {}
        base = named(self.recipe) if self.recipe is not None else Run(name=Path(self.config or "").stem)
        return resolve(base, list(self.sets), document)


def settle(store: Store, choices: Choices, say: Callable[[str], None] = lambda _: None) -> Run:
    """The configuration to run with. It starts from the run's own settings, or from the recipe's for a new run.

    `say` gets a line for each changed setting that is accepted.

    The file and then the `--set` lines change it. Raises SettingError that lists the changed settings when the run has traces
    and the change is not accepted.
    """
    recipe, sets = choices.recipe, list(choices.sets)
    old = store.load_run() if store.exists() else None
    begun = bool(store.numbers("rounds") or store.numbers("evals"))  # before, no trace depends on the old settings
    if old is None or (recipe is not None and not begun):
        run = with_targets(choices.fresh())
        refuse_unread_objective([run], sets)
        return run
    document = read_config(choices.config) if choices.config else {}
    if recipe is not None and resolve(named(recipe), sets, document).name != old.name:
        raise SettingError(f"this run was started from recipe '{old.name}'", "--recipe", "Leave it out, or use another --run")
    run = with_targets(resolve(old, sets, document), new=False)  # run.json holds, even when the recipe has changed since
    refuse_unread_objective([run], sets)
    changed = [difference for difference in differences(old, run) if decides(difference[0])]
    if begun and changed and not choices.accept_changes:
        listed = ", ".join(f"{name} was {was!r}, now {now!r}" for name, was, now in changed[:8])
        more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
        raise SettingError(
            f"this run was made with other settings: {listed}{more}",
            store.uri,
            "Leave them out to resume as it was, use another --run, or pass --accept-changes",
        )
    for name, was, now in changed if begun else ():
        say(f"accepted: {name} was {was!r}, now {now!r}. What depends on it is made anew.")
    return run


def read_config(path: str) -> dict[str, Any]:
    """The settings of a `--config` file. Raises SourceError when it cannot be read, and SettingError as `read_document`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read the configuration ({error})", path, "Check the path given to --config") from error
    return read_document(Run, text, path)


def parse_numbers(text: str, option: str, example: str) -> list[int]:
    """The numbers of a text such as `0,2,5..8`. Raises SettingError for another text, with `example` as the remedy."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        if not (first.isdecimal() and first.isascii() and (not dots or (last.isdecimal() and last.isascii()))):
            raise SettingError(f"'{part.strip()}' is no number or range of numbers", f"{option} {text}", f"Write it as {example}")
        start, end = int(first), int(last or first)
        if end < start or end - start >= 10_000:
            raise SettingError(f"{part.strip()} holds nothing, or too much", f"{option} {text}", f"Write it as {example}")
        numbers += range(start, end + 1)
    return numbers


def chosen_policies(store: Store, text: str) -> list[int]:
    """The policy versions of a text such as `0,last`, in its order and without repeats.

    Raises SettingError for a malformed text, and UserError for a policy that was never published.
    """
    last = store.latest_policy()
    words = [str(last) if word.strip() == "last" else word for word in text.split(",")]
    numbers = list(dict.fromkeys(parse_numbers(",".join(words), "--policy", "0,last or 0..3")))
    for number in numbers:
        if not store.has_policy(number):
            raise UserError(f"policy {number} is not published", store.locate("policy"), f"Policies here: 0 to {last}")
    return numbers
