"""Every setting in one line: what it does, its type and its default, and what a change of it makes stale."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config import CHOOSES, UNCOUNTED, Reward, Run
from pipeline.config.method import Weights
from pipeline.errors import SettingError, nearest
from pipeline.stages import PLAN

_BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any value"}
_FREE = {"teachers": "teachers.NAME", "rewards": "grade.rewards.NAME"}  # what stands for the name of one entry


@dataclass(frozen=True)
class Setting:
    """One setting. default is written as in a settings file; "" means that a value must be given."""

    name: str
    meaning: str
    kind: str
    default: str
    stale: str


def explain(name: str) -> list[Setting]:
    """The setting `name`, or all settings of the section `name`; "" means every setting.

    Raises SettingError that suggests the nearest names.
    """
    known = settings()
    asked = _general(name)
    found = [one for key, one in known.items() if key == asked or not asked or key.startswith(f"{asked}.")]
    if found:
        return found
    same = [key for key in known if key.rpartition(".")[2] == asked.rpartition(".")[2]]
    if same:
        hint = "Did you mean " + " or ".join(f"'{key}'" for key in same[:4]) + "?"
    else:
        hint = nearest(asked, known, "`egrsd explain` lists all of them")
    raise SettingError("unknown setting", name, hint)


def _general(name: str) -> str:
    """The name with NAME in the place of a teacher's or a reward's own name."""
    name = re.sub(r"^teachers\.[^.]+", "teachers.NAME", name)
    return re.sub(r"^grade\.rewards\.[^.]+", "grade.rewards.NAME", name)


@lru_cache(maxsize=1)
def settings() -> dict[str, Setting]:
    """All settings by dotted name, in the order of the configuration."""
    return {one.name: one for one in _walk(Run, "", Run(name="run"))}


def _walk(section: type[BaseModel], before: str, values: BaseModel | None) -> Iterator[Setting]:
    """The settings of a section. values: the section as it stands in a run of nothing but defaults."""
    for key, field in section.model_fields.items():
        name, kinds = f"{before}{key}", list(_sections(field.annotation))
        value = getattr(values, key) if values is not None else field.get_default(call_default_factory=True)
        if not kinds or get_origin(_bare(field.annotation)) in (dict, tuple) or type(None) in get_args(field.annotation):
            default = "" if field.is_required() else _written(value)
            meaning = " ".join((field.description or "").split()) + _whose(name)
            yield Setting(name, meaning, _kind(field), default, stale(name, field))
        for kind in kinds:
            yield from _walk(kind, f"{_FREE.get(key, name)}.", value if isinstance(value, kind) else None)


def _whose(name: str) -> str:
    """Where a constant of the token weight is read. Labels and training have the same ones under two names."""
    section, _, key = name.partition(".")
    if key not in Weights.model_fields or section not in ("label", "objective"):
        return ""
    return f". Stored labels and report read it; training reads objective.{key}" if section == "label" else ". Training reads it"


def _bare(kind: Any) -> Any:
    """A type without `Annotated`, and without None."""
    if hasattr(kind, "__metadata__"):
        return _bare(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return _bare(next(part for part in get_args(kind) if part is not type(None)))
    return kind


def _sections(kind: Any) -> Iterator[type[BaseModel]]:
    """The sections that a setting of this type holds: one, or one for each name or entry."""
    bare = _bare(kind)
    if get_origin(bare) is dict:
        bare = _bare(get_args(bare)[1])
    elif get_origin(bare) is tuple:
        bare = _bare(get_args(bare)[0])
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        yield bare


# ---- type and default --------------------------------------------------------------------------------------------------


def _kind(field: FieldInfo) -> str:
    """The type of a setting in words, with its bounds."""
    nullable = " or null" if type(None) in get_args(field.annotation) else ""
    bounds = [
        _BOUNDS[limit].format(f"{value:g}" if isinstance(value, float) else value)
        for part in field.metadata
        for limit in _BOUNDS
        if (value := getattr(part, limit, None)) is not None
    ]
    return ", ".join([_words(field.annotation), *dict.fromkeys([*bounds, *_inner_bounds(field.annotation)])]) + nullable


def _inner_bounds(kind: Any) -> list[str]:
    """Bounds that stand inside a type, such as those of `Count | None`."""
    inner = [part for part in get_args(kind) if hasattr(part, "__metadata__")] if get_origin(kind) in (Union, UnionType) else []
    parts = [limit for one in inner for whole in one.__metadata__ for limit in (whole, *getattr(whole, "metadata", ()))]
    return [
        text.format(value)
        for part in parts
        for limit, text in _BOUNDS.items()
        if (value := getattr(part, limit, None)) is not None
    ]


def _words(kind: Any) -> str:
    bare = _bare(kind)
    if get_origin(bare) is Literal:
        return (
            ", ".join(map(str, get_args(bare)[:-1])) + f" or {get_args(bare)[-1]}"
            if len(get_args(bare)) > 1
            else str(get_args(bare)[0])
        )
    if get_origin(bare) is dict:
        inner = _bare(get_args(bare)[1])
        return "sections by name" if isinstance(inner, type) and issubclass(inner, BaseModel) else f"{_words(inner)} by name"
    if get_origin(bare) is tuple:
        parts = get_args(bare)
        if isinstance(inner := _bare(parts[0]), type) and issubclass(inner, BaseModel):
            return "list of sections"
        return f"list of {len(parts)}: {_words(parts[0])}" if parts[-1] is not Ellipsis else f"list: {_words(parts[0])}"
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        return "section"
    return _NAMES.get(bare, str(bare))


def _written(value: Any) -> str:
    """A default as one writes it in a file."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return '""' if not value else value.replace("\n", "\\n")
    if isinstance(value, dict | list | tuple):
        return ("{}" if isinstance(value, dict) else "[]") if not value else ",".join(map(_written, value))
    return str(value)


# ---- what becomes stale ------------------------------------------------------------------------------------------------


def made_stale(setting: str) -> str:
    """What a change of `setting` makes stale, by its name in a run, which has names of teachers and rewards."""
    known = settings().get(name := _general(setting))
    return stale(name) if known is None else known.stale


def stale(name: str, field: FieldInfo | None = None) -> str:
    """What a change of a setting makes stale: stages, and what follows them."""
    marks = field.metadata if field is not None else ()
    if UNCOUNTED in marks or name.startswith(("metrics.", "engines.")) or name.endswith("stall_timeout_s"):
        return "nothing"
    if CHOOSES in marks:
        return "nothing; later rounds are planned with it"
    readers = [
        stage.name for stage in PLAN if stage.reads_setting(name.replace(".NAME", ".*") if name.startswith("teachers") else name)
    ]
    if name.startswith("grade.rewards.NAME"):
        readers = ["grade"] if name.endswith(".weight") else ["reward", "grade"]
    if readers:
        return ", ".join(readers) + (" and what follows" if readers[-1] != PLAN[-1].name else "")
    if name.startswith("evaluation."):
        return "evaluations"
    if name.startswith(("objective.", "train.")):
        return "no stage; policies stay as they are until you run `egrsd train`"
    return "nothing"


__all__ = ["Reward", "Setting", "explain", "made_stale", "settings", "stale"]
