"""What can go wrong, as one small picklable hierarchy. Every message says what, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EgrsdError(Exception):
    """A failure the system understands; `exit_code` is what the command line ends with."""

    exit_code = 1

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where, remedy)  # all three in args, so the error survives pickling between Ray processes
        self.what, self.where, self.remedy = what, where, remedy

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}. {self.remedy}" if self.remedy else text


class UserError(EgrsdError):
    """The user's mistake: a setting, a file, a column, a path. Exit code 2."""

    exit_code = 2


class SettingError(UserError):
    """A setting that is unknown, of the wrong type, or in conflict with another; `where` is its dotted name."""


class SourceError(UserError):
    """A problem source that cannot be read or lacks what the recipe needs; `where` is file and line or column."""


class ModelError(UserError):
    """A model, tokenizer or adapter that is missing or does not fit the run; `where` is its path."""


class ResourceError(UserError):
    """The Ray cluster lacks what the recipe asks for; the message says how much of what is missing."""


class StoreError(EgrsdError):
    """A run directory, shard or manifest entry that cannot be read, written or trusted; `where` is its path."""


class ContractError(EgrsdError):
    """A stage wrote columns that break the contract; `where` is stage and column. A bug, not a user's mistake."""


class EngineError(EgrsdError):
    """An inference engine that could not start, died for good, or broke the log-prob contract."""


class TrainingError(EgrsdError):
    """The trainer stopped: non-finite loss, a rank that keeps dying, shards it may not train on."""


def to_data(error: EgrsdError) -> list[str]:
    """An error as plain text, for where it must travel as data; `from_data` makes it again."""
    return [type(error).__name__, *error.args]


def from_data(data: list[str]) -> EgrsdError:
    """The error that `to_data` wrote down."""
    kind, *said = data
    known = {found.__name__: found for found in _family(EgrsdError)}
    return known.get(kind, EgrsdError)(*said)


def _family(error: type[EgrsdError]) -> list[type[EgrsdError]]:
    return [error, *(found for child in error.__subclasses__() for found in _family(child))]


def first_line(error: BaseException) -> str:
    """The first line of an error that says something; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(word: str, known: Iterable[str], otherwise: str, hint: str = "Did you mean '{}'?") -> str:
    """The remedy for a word that is not known: `hint` with the most similar known word for `{}`, else `otherwise`."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return hint.replace("{}", found[0]) if found else otherwise
