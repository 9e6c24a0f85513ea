"""The errors of the project, one small hierarchy. Every message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import shlex
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

LAST_WORD = "exit code %d. error: %s"  # how the log of a command that failed ends
GONE = "the run's folder has gone: it was moved, or its disk has left"


class EgrsdError(Exception):
    """A failure that the project explains to its user. The command line ends with `exit_code`."""

    exit_code = 1

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where, remedy)  # all three in args: pickling between Ray processes keeps them
        self.what, self.where, self.remedy = what, where, remedy

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        end = "" if text.endswith(("?", "!", ".")) else "."
        return f"{text}{end} {self.remedy}" if self.remedy else text


class UserError(EgrsdError):
    """A mistake that the user can mend: a setting, a file, a column, a path. Exit code 2."""

    exit_code = 2


class SettingError(UserError):
    """A setting that is unknown, of the wrong type, or in conflict with another. `where` is its dotted name."""


class SourceError(UserError):
    """A problem source that cannot be read or lacks what the recipe needs. `where` is its file with line or column."""


class ModelError(UserError):
    """A model, tokenizer or adapter that is missing or does not fit the run. `where` is its path."""


class UnreachableError(ModelError):
    """A hub's model of which nothing is known: the hub cannot be reached, and its local copy lacks the part that is asked for."""


class ResourceError(UserError):
    """The Ray cluster lacks what the recipe asks for. The message says which resource is missing, and how much of it."""


class StoreError(EgrsdError):
    """A run directory, shard or manifest entry that cannot be read, written or trusted. `where` is its path."""


class ContractError(EgrsdError):
    """A stage wrote columns that break the contract. `where` is stage and column. It is a bug, not a user's mistake."""


class ClusterError(EgrsdError):
    """The Ray cluster was lost, or a part of it ran out of memory or space. The same command goes on."""


class EngineError(EgrsdError):
    """An inference engine that could not start, kept dying, or broke the contract on its numbers."""


class TrainingError(EgrsdError):
    """The trainer stopped. Its loss was not finite, a rank kept dying, or it was given shards that it may not train on."""


def to_data(error: EgrsdError) -> list[str]:
    """An error as a list of texts: name of its class, what, where, remedy. `from_data` makes the error again."""
    return [type(error).__name__, *error.args]


def from_data(data: list[str]) -> EgrsdError:
    """The error that `to_data` turned into texts. An unknown class becomes an EgrsdError."""
    name, *args = data
    known = {kind.__name__: kind for kind in _family(EgrsdError)}
    return known.get(name, EgrsdError)(*args)


def _family(error: type[EgrsdError]) -> list[type[EgrsdError]]:
    return [error, *(kind for child in error.__subclasses__() for kind in _family(child))]


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, or the name of its class when the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def whole_cause(error: BaseException, most: int = 1500) -> str:
    """An error and what caused it in one line of at most `most` characters: classes, and whole messages.

    An error without a message is told by the line of code that raised it.
    """
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 5:
        text = " ".join(str(cause).partition("\nTraceback ")[0].split())  # some messages of vLLM end in a traceback
        if not text and (frames := traceback.extract_tb(cause.__traceback__)):
            text = f"{frames[-1].line} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
        parts.append(f"{type(cause).__name__}: {text}" if text else type(cause).__name__)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return ", because of ".join(dict.fromkeys(parts))[:most]


def nearest(word: str, known: Iterable[str], otherwise: str, hint: str = "Did you mean '{}'?") -> str:
    """The remedy for an unknown word: `hint`, with the most similar known word in place of `{}`.

    It is `otherwise` when no known word is similar.
    """
    matches = difflib.get_close_matches(word, list(known), n=1)
    return hint.replace("{}", matches[0]) if matches else otherwise


def refuse_unread(what: str, settings: Iterable[str], reads: Callable[[str], bool], hint: Callable[[str], str]) -> None:
    """Raise SettingError, with the text `what`, for the first of the `settings` that a verb does not read.

    Settings are dotted names. `reads` tells whether the verb reads one, and `hint` is the remedy for one that it does not read.
    """
    for setting in settings:
        if not reads(setting):
            raise SettingError(what, setting, hint(setting))


def command(*words: object) -> str:
    """A command that a message offers, in backticks. Words are quoted where a shell needs it, so the text can be pasted."""
    return f"`egrsd {shlex.join(str(word) for word in words)}`"
