"""Settings from outside: `--config` and `--set` change a run, plain data becomes a run, and two runs are compared."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import ValidationError

from pipeline.config import Pool, Run, Teacher
from pipeline.config.objective import as_meant, readers, unread
from pipeline.config.section import Section
from pipeline.errors import SettingError, nearest
from pipeline.written import read_override

Kind = TypeVar("Kind", bound=Section)
UNKNOWN = "unknown setting"


def resolve(base: Run, overrides: list[str] | None = None, document: dict[str, Any] | None = None) -> Run:
    """A copy of `base`, changed by a configuration document and then by `a.b=value` overrides (pipeline/written.py).

    A later override has the last word. The command line refuses a setting that is given twice before it comes here.

    Raises SettingError, with the name of the setting, when it is unknown, of the wrong type, or in conflict with another.
    """
    data = base.model_dump(mode="json")
    section = (document or {}).get("objective")
    if document and isinstance(section, dict):
        document = document | {"objective": as_meant(section)}
    _overlay(data, document or {}, "")
    for override in overrides or []:
        _overlay(data, read_override(type(base), override), "")
    return load(data)


def load(data: dict[str, Any]) -> Run:
    """A Run from plain data. Raises SettingError that names the first wrong field and says what it should be."""
    return read_section(Run, data)


def read_section(kind: type[Kind], data: dict[str, Any], name: str = "") -> Kind:
    """The section `name` from plain data. Raises SettingError that names the first wrong field and says what it should be."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (*([name] if name else []), *first["loc"])) or "configuration"
        explained = first["type"] in {"value_error", "missing"} or isinstance(first["input"], dict)
        what = first["msg"].removeprefix("Value error, ") + ("" if explained else f" (got {first['input']!r})")
        what = UNKNOWN if first["type"] == "extra_forbidden" else what
        raise SettingError(what, where, _remedy(where)) from None


def _remedy(where: str) -> str:
    """What to do about a value that a setting cannot have."""
    if where.endswith(".temperature"):
        return f"Write a number up to 2. For greedy answers set {where.removesuffix('temperature')}top_k=1"
    return f"`egrsd explain {where}` says which values it takes" if "." in where else "`egrsd explain` lists every setting"


def differences(old: Run, new: Run) -> list[tuple[str, Any, Any]]:
    """The settings that differ between two runs, as (dotted name, old value, new value)."""
    a, b = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return [(key, a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def undoing(changed: list[tuple[str, Any, Any]]) -> list[str]:
    """The words `--set a.b=value` that give changed settings their old values. Empty where no such word gives one of them."""
    words = [_word(name, was) for name, was, _ in changed]
    return [] if None in words else [part for word in words if word is not None for part in ("--set", word)]


def _word(name: str, was: Any) -> str | None:
    """`a.b=value` that is read as a single value, which it holds as text or as JSON. None where nothing is read as that value."""
    if was is not None and not isinstance(was, str | int | float):
        return None
    as_json = json.dumps(was, ensure_ascii=False)
    for text in [was, as_json] if isinstance(was, str) else [as_json]:
        with contextlib.suppress(SettingError):
            read = list(_flatten(read_override(Run, f"{name}={text}")).values())
            if read == [was] and type(read[0]) is type(was):
                return f"{name}={text}"
    return None


def named(overrides: list[str]) -> set[str]:
    """Dotted names of all settings that overrides change, also inside whole sections. Raises SettingError as `read_override`."""
    return {name for override in overrides for name in _flatten(read_override(Run, override))}


def refuse_unread_objective(runs: Iterable[Run], overrides: list[str]) -> None:
    """Raise SettingError for the first setting of `objective` that an override changes and that no objective of `runs` reads."""
    objectives = [run.objective for run in runs]
    key = unread(objectives, named(overrides))
    if key is not None:
        names = " or ".join(dict.fromkeys(f"'{objective.name}'" for objective in objectives))
        raise SettingError(f"objective {names} does not read this setting", f"objective.{key}", readers(key))


def decides(setting: str) -> bool:
    """Whether `setting`, a dotted name, can change a result of the run."""
    asks_a_server = re.fullmatch(r"teachers\.[^.]+\.(timeout_s|tries|concurrency|sample)", setting)
    bounds = setting.endswith(("stall_timeout_s", "shards_here", "score.fallback", "logprob_gap", "logprob_gap_max"))
    return not (setting.startswith("metrics.") or bounds or asks_a_server)


def _overlay(data: dict[str, Any], document: dict[str, Any], where: str) -> None:
    for key, value in document.items():
        name = f"{where}{key}"
        free_form = where.endswith(("options.", "resources.", "labels.", "settings.")) or where == "teachers."
        free_form |= re.fullmatch(r"grade\.rewards\.[^.]+\.", where) is not None  # an entry has what was written of it, no more
        if key not in data and not free_form:
            hint = nearest(str(key), data, f"Known here: {', '.join(map(str, data))}", f"Did you mean '{where}{{}}'?")
            raise SettingError(UNKNOWN, name, hint)
        clears = not value and key in {
            "options",
            "resources",
            "labels",
            "settings",
            "teachers",
        }  # `{}` empties it: its keys are free
        if isinstance(value, dict) and isinstance(data.get(key), dict) and not clears:
            _overlay(data[key], value, f"{name}.")
        elif isinstance(value, dict) and data.get(key) is None and (section := _begun(name)) is not None:
            data[key] = section
            _overlay(data[key], value, f"{name}.")
        elif isinstance(value, dict) and isinstance(data.get(key), list):
            _overlay({entry["name"]: entry for entry in data[key]}, value, f"{name}.")
        else:
            data[key] = value


def _begun(name: str) -> dict[str, Any] | None:
    """The defaults of a section that a run may lack, and that one of its settings begins: a pool or a teacher."""
    if name == "engines.score" or re.fullmatch(r"teachers\.[^.]+\.engines", name):
        return Pool().model_dump(mode="json")
    return Teacher().model_dump(mode="json") if re.fullmatch(r"teachers\.[^.]+", name) else None


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) and "name" in entry for entry in value):
            value = {entry["name"]: entry for entry in value}  # an entry of a list is found by its name
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
