"""The code of a reward: a file's text or an installed module, with the hash by which shards know it. Nothing is imported here.

The text of a file travels to the workers with the work, so a cluster needs no copy of it. A module must be installed on every
node; a worker refuses one whose file differs from the driver's. Code never comes from a run's folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

from pipeline.config import Reward, Run
from pipeline.config.rewards import SHIPPED
from pipeline.digest import digest, short
from pipeline.errors import SettingError

MOST_BYTES = 1 << 20  # of a file of rewards: its text travels with every task


@dataclass(frozen=True)
class Code:
    """The code of one reward.

    place: the file or module, for messages. Empty for a shipped function, whose version belongs to the project.
    entry: name of the function. Empty when the file must tell: the function with the reward's name, or its only one.
    text: the source of a file. Empty for a module.
    hash: of the source. Empty when it could not be read; `problem` then says why, and `remedy` what to do.
    """

    place: str = ""
    entry: str = ""
    text: str = ""
    hash: str = ""
    problem: str = ""
    remedy: str = ""

    def check(self, name: str) -> None:
        """Raise SettingError that names the reward when its code is not there."""
        if self.problem:
            raise SettingError(self.problem, f"grade.rewards.{name}", self.remedy)


def codes_of(run: Run, inside: str | None = None) -> dict[str, Code]:
    """The code of every reward of a run, by name, as it is on this machine now. `inside`: the run's own local folder.

    A missing file raises nothing: who only reads the run does not need it.
    """
    return {reward.name: _code(reward, inside) for reward in run.grade.rewards}


def identity(reward: Reward, code: Code) -> str | None:
    """The hash of what decides the values of a reward: all but its weight. None when its code cannot be read here."""
    if code.problem:
        return None
    return digest([reward.model_dump(mode="json", exclude={"weight"}), code.hash])


def check_codes(codes: Mapping[str, Code]) -> None:
    """Raise SettingError for the first reward whose code is not there."""
    for name, code in codes.items():
        code.check(name)


def _code(reward: Reward, inside: str | None) -> Code:
    if reward.function in SHIPPED:
        return Code(hash=reward.function)
    place, _, entry = reward.function.rpartition(":")
    if reward.function.endswith(".py"):
        place, entry = reward.function, ""
    return _file(place, entry, inside) if place.endswith(".py") else _module(place, entry)


def _file(place: str, entry: str, inside: str | None) -> Code:
    path = Path(place).expanduser()
    if inside is not None and path.resolve().is_relative_to(Path(inside).resolve()):
        remedy = "Move the file out of the run's folder: a run that somebody sends you must bring no code along"
        return Code(place, entry, problem=f"{place} lies in the folder of the run", remedy=remedy)
    try:
        if path.stat().st_size > MOST_BYTES:
            return Code(place, entry, problem=f"{place} is larger than 1 MiB", remedy="Keep data out of it")
        data = path.read_bytes()
        return Code(place, entry, data.decode("utf-8"), short(data))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        remedy = f"Name an existing file; relative names are looked for in {os.getcwd()}"
        return Code(place, entry, problem=f"{place} cannot be read: {why}", remedy=remedy)


def _module(place: str, entry: str) -> Code:
    spec = find_module(place)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        remedy = "Install it on every node, or name a file: path/to/rewards.py:function"
        return Code(place, entry, problem=f"there is no Python module '{place}' on this machine", remedy=remedy)
    return Code(place, entry, hash=short(Path(spec.origin).read_bytes()))


def find_module(place: str) -> ModuleSpec | None:
    """The spec of a dotted module. Unlike importlib.util.find_spec it runs no code of the packages around it."""
    spec: ModuleSpec | None = None
    name, locations = "", None
    for part in place.split("."):
        name = f"{name}.{part}" if name else part
        if name != part and locations is None:
            return None
        found = (finder.find_spec(name, locations) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((one for one in found if one is not None), None)
        if spec is None:
            return None
        locations = spec.submodule_search_locations
    return spec


def module_hash(place: str) -> str:
    """The hash of an installed module's file, or "" when there is none."""
    spec = find_module(place)
    origin = spec.origin if spec is not None else None
    return short(Path(origin).read_bytes()) if origin is not None and origin.endswith(".py") else ""
