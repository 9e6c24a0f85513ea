"""The settings of a verb: those of its run or of a recipe, changed by a configuration file and then by `--set`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Run
from pipeline.errors import SettingError, SourceError, UserError
from pipeline.inspection.explained import made_stale
from pipeline.models.layers import with_targets
from pipeline.overrides import decides, differences, refuse_unread_objective, resolve
from pipeline.recipes import descriptions
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

    @property
    def can_begin(self) -> bool:
        """Whether a new run can start from them: they name a recipe or a file."""
        return self.recipe is not None or self.config is not None

    def fresh(self) -> Run:
        """The settings of a new run: those of the recipe, or else the defaults, with the file and `--set` over them.

        Raises SettingError when neither a recipe nor a file is given.
        """
        if not self.can_begin:
            remedy = "Give --recipe NAME (`egrsd recipes` lists them), or --config FILE (`egrsd init` writes one)"
            raise SettingError("a new run needs a recipe or a settings file", "--recipe", remedy)
        return self.over(named(self.recipe) if self.recipe is not None else Run(name=Path(self.config or "").stem))

    def over(self, run: Run) -> Run:
        """The settings of `run` with the file and then `--set` over them."""
        return resolve(run, list(self.sets), read_config(self.config) if self.config is not None else {})

    def or_demo(self) -> Choices:
        """These choices, or those of the recipe `demo` where they name neither a recipe nor a file."""
        return self if self.can_begin else replace(self, recipe="demo")

    def words(self) -> list[str]:
        """The options of a command that chooses the same settings."""
        given = [("--recipe", self.recipe), ("--config", self.config), *(("--set", line) for line in self.sets)]
        return [word for option, value in given if value is not None for word in (option, value)]


class Settled(NamedTuple):
    """The settings that choices make of a run. old: those that it has, if it is there. begun: whether it has traces."""

    run: Run
    old: Run | None
    begun: bool

    def changed(self) -> list[tuple[str, Any, Any]]:
        """The settings that differ from the run's own and can change a result: (dotted name, old value, new value)."""
        return [one for one in differences(self.old, self.run) if decides(one[0])] if self.old is not None else []


def settled(store: Store | None, choices: Choices) -> Settled:
    """The settings that `choices` make of the run in `store`, or of a new run where none is there.

    Until a run has traces, a recipe or a file decides as for a new run. Raises SettingError for a run of another recipe.
    """
    old = store.load_run() if store is not None and store.exists() else None
    if store is None or old is None:
        return Settled(choices.fresh(), None, False)
    begun = bool(store.numbers("rounds") or store.numbers("evals"))
    if not choices.can_begin or (begun and choices.recipe is None):
        return Settled(choices.over(old), old, begun)
    fresh = choices.fresh()
    if fresh.name != old.name and (begun or (choices.recipe is None and old.name in descriptions())):
        remedy = "Leave it out" if choices.recipe is not None else f"Add --recipe {old.name}"
        option = "--recipe" if choices.recipe is not None else "--config"
        raise SettingError(f"this run was started from recipe '{old.name}'", option, f"{remedy}, or use another --run")
    return Settled(choices.over(old) if begun else fresh, old, begun)  # run.json holds, even when the recipe has changed since


def settle(store: Store, choices: Choices, say: Callable[[str], None] = lambda _: None) -> Run:
    """The configuration to run with, which `settled` tells. `say` gets a line for each changed setting that is accepted.

    Raises SettingError that lists the changed settings when the run has traces and the change is not accepted.
    """
    found = settled(store, choices)
    is_new = found.old is None or (choices.can_begin and not found.begun)
    found = found._replace(run=with_targets(found.run, new=is_new))
    refuse_unread_objective([found.run], list(choices.sets))
    changed = found.changed()
    listed = ", ".join(f"{name} was {was!r}, now {now!r}" for name, was, now in changed[:8])
    listed += f" and {len(changed) - 8} more" if len(changed) > 8 else ""
    if found.begun and changed and not choices.accept_changes:
        raise SettingError(
            f"this run was made with other settings: {listed}",
            store.uri,
            "Leave them out to resume as it was, use another --run, or pass --accept-changes",
        )
    if changed and not found.begun:
        say(f"note: settings have changed since a start that made nothing: {listed}.")
    for name, was, now in changed if found.begun else ():
        say(f"accepted: {name} was {was!r}, now {now!r}. It makes stale: {made_stale(name)}.")
    return found.run


def read_config(path: str) -> dict[str, Any]:
    """The settings of a `--config` file. Raises SourceError when it cannot be read, and SettingError as `read_document`."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
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
