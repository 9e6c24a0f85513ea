"""The child process of one reward: it imports the user's function, checks its signature, and calls it. Nothing else does.

A function has TRL's signature: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, plain or async.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import inspect
import math
import os
import signal
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from pipeline.errors import first_line
from pipeline.grader.children import done, note
from pipeline.grader.code import Code, module_hash
from pipeline.grader.python_tests import python_tests

FINE, VALUES, FAILED, READY = "fine", "values", "failed", "ready"
STANDARD = ("prompts", "completions", "completion_ids")
_PR_SET_PDEATHSIG = 1
_LARGEST = 3e38  # a float32 column holds no more


class Refused(Exception):
    """What is wrong with a reward function, in one line."""


@dataclass(frozen=True)
class Job:
    """What a child works with: the reward's name, its function's word in the settings, its own settings, its code."""

    name: str
    function: str
    settings: dict[str, Any]
    code: Code


@dataclass(frozen=True)
class Call:
    """One question: the arguments by name, each a list of `rows` values. `known` asks for the check of the signature alone."""

    arguments: dict[str, list[Any]]
    rows: int
    known: tuple[str, ...] | None = None


def serve(job: Job, pipe: Connection) -> None:
    """The loop of a child: `Call`s come in, and (FINE or VALUES or FAILED, values or a sentence) goes out."""
    os.dup2(2, 1)  # what a function prints belongs into the log
    end_with_parent()
    function: Callable[..., Any] | None = None
    while True:
        try:
            call = pipe.recv()
        except (EOFError, OSError):
            return
        note(pipe, READY)
        try:
            function = function or load(job)
            reply = _answer(function, job, call)
        except Refused as error:
            reply = (FAILED, str(error))
        except BaseException as error:  # sys.exit() and the like are failures of the function too
            reply = (FAILED, f"raised {type(error).__name__}: {first_line(error)}"[:300])
        done(pipe, reply)


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent dies: a function that hangs would otherwise outlive the whole run."""
    with contextlib.suppress(OSError, AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:
        os._exit(1)


def _answer(function: Callable[..., Any], job: Job, call: Call) -> tuple[str, Any]:
    if job.code.place:
        known = call.known if call.known is not None else tuple(call.arguments)
        arguments = _arguments(function, job, call.arguments, known)
    else:
        arguments = call.arguments
    if call.known is not None:
        return FINE, ""
    result = function(**arguments)
    if not job.code.place:
        return VALUES, result
    if inspect.isawaitable(result):
        result = asyncio.run(_waited(result))
    return VALUES, _values(result, call.rows)


async def _waited(result: Any) -> Any:
    return await result


def load(job: Job) -> Callable[..., Any]:
    """The function of a reward. Raises Refused, and whatever the user's file raises when it is imported."""
    if not job.code.place:
        return partial(python_tests, settings=job.settings)
    module = _of_text(job) if job.code.text else _installed(job)
    entry = job.code.entry or _only(module, job)
    function = getattr(module, entry, None)
    if function is None:
        raise Refused(f"{job.code.place} has no '{entry}'; it has: {', '.join(_own(module)) or 'no function'}")
    if not callable(function):
        raise Refused(f"'{entry}' of {job.code.place} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def _of_text(job: Job) -> types.ModuleType:
    module = types.ModuleType(f"reward_{job.name}")
    module.__file__ = job.code.place
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        source = compile(job.code.text, job.code.place, "exec", dont_inherit=True)  # as an import reads it
    except SyntaxError as error:
        raise Refused(f"{job.code.place} is not Python: line {error.lineno}: {error.msg}") from error
    exec(source, module.__dict__)
    return module


def _installed(job: Job) -> types.ModuleType:
    if module_hash(job.code.place) != job.code.hash:
        raise Refused(f"module {job.code.place} of this node differs from the driver's: install the same one on every node")
    return importlib.import_module(job.code.place)


def _own(module: types.ModuleType) -> list[str]:
    """Names of the functions that a module itself defines, without those that begin with `_`."""
    mine = (name for name, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__)
    return sorted(name for name in mine if not name.startswith("_"))


def _only(module: types.ModuleType, job: Job) -> str:
    own = _own(module)
    if job.name in own:
        return job.name
    if len(own) != 1:
        many = f"{job.code.place} defines {', '.join(own)}" if own else f"{job.code.place} defines no function"
        raise Refused(f"{many}: name one, as in {job.code.place}:NAME")
    return own[0]


def _arguments(function: Callable[..., Any], job: Job, given: dict[str, list[Any]], known: Iterable[str]) -> dict[str, Any]:
    """The arguments that the function takes, with the reward's settings. Raises Refused for another signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise Refused(f"its signature cannot be read ({first_line(error)})") from error
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if "completions" not in by_name:
        raise Refused("takes no argument `completions`; it must be f(prompts, completions, completion_ids, **columns)")
    known = {*STANDARD, *known}
    if both := sorted(job.settings.keys() & known):
        raise Refused(f"settings.{both[0]} has the name of a column of the source: rename it")
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if lacking := [name for name in needed if name not in by_name or name not in known | job.settings.keys()]:
        there = ", ".join(sorted(known - set(STANDARD)))
        raise Refused(f"needs '{lacking[0]}', which is neither a column ({there}) nor one of its settings")
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not takes_all and (unread := sorted(job.settings.keys() - by_name)):
        raise Refused(f"does not take settings.{unread[0]}")
    return {name: value for name, value in (given | job.settings).items() if takes_all or name in by_name}


def _values(result: Any, rows: int) -> list[float | None]:
    """The values that a function returned, checked. Raises Refused."""
    if isinstance(result, (str, bytes, dict)) or not hasattr(result, "__len__") or not hasattr(result, "__iter__"):
        raise Refused(f"returned a {type(result).__name__}, not a list of numbers")
    values = list(result)
    if len(values) != rows:
        raise Refused(f"returned {len(values)} values for {rows} traces")
    return [_value(value, place) for place, value in enumerate(values)]


def _value(value: Any, place: int) -> float | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise Refused(f"returned {value!r:.40} ({type(value).__name__}) for trace {place}, not a number or None")
    number = float(value)
    if not math.isfinite(number) or abs(number) > _LARGEST:
        raise Refused(f"returned {number} for trace {place}, which is no finite number")
    return number
