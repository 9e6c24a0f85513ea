"""Settings as a person writes them, in `--set` and in YAML files. The type of a setting decides how its value is read.

Text is text: `#### (.+)`, `None`, `010` and `1:30` arrive as they are written. A number is decimal. A list takes commas, or a
YAML list. `null` stands only where a setting may be null. A value that could mean two things is refused. YAML gives the
structure of a file and nothing else: no value changes its type because of how it looks.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from pipeline.errors import SettingError, nearest

_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9]\d*|[1-9]\d{0,2}(?:_\d{3})+)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?", re.ASCII)
_NOT_FINITE = {"inf", "infinity", "nan"}
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULLS = ("null", "~")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"", re.DOTALL)
_DEEPEST = 8  # levels of lists and mappings in a value without a type
_MOST_DIGITS = 40
_MOST_PARTS = 100_000  # of a document, counted as often as its aliases repeat them


@dataclass(frozen=True)
class _Place:
    """Where a value was written: the dotted name of its setting, and the file. Without a file it stands in `--set`."""

    name: str = ""
    file: str | None = None

    def below(self, key: str) -> _Place:
        """The place of a setting in this section."""
        return replace(self, name=f"{self.name}.{key}" if self.name else key)

    def error(self, what: str, node: yaml.Node, remedy: str = "") -> SettingError:
        """An error that names the setting, and the line of a file."""
        line = "" if self.file is None else f"{self.file}:{node.start_mark.line + 1}"
        where = ", ".join(part for part in (line, self.name) if part)
        return SettingError(what, where, remedy or "See `egrsd recipes --show NAME` for every setting")


def read_document(model: type[BaseModel], text: str, file: str) -> dict[str, Any]:
    """The settings that a YAML file holds, each with a value of its type, as nested dicts.

    Raises SettingError, with the line, for text that is no YAML and for a value that its setting cannot have. An unknown
    setting, and one that is given twice, raise it too.
    """
    place = _Place(file=file)
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingError(f"is not YAML: {' '.join(str(error).split())}", file, "Check the line it names") from error
    if not isinstance(node, yaml.MappingNode):
        raise SettingError("holds no settings", file, "Write `section: {setting: value}`, as `egrsd recipes --show NAME` prints")
    _refuse_size(node, place)
    return dict(_section(node, model, place))


def read_override(model: type[BaseModel], override: str) -> dict[str, Any]:
    """The setting that `a.b=text` changes, as nested dicts around a value of its type. The text is taken as it stands.

    Raises SettingError for an unknown setting, and for text that the setting cannot have.
    """
    name, sep, text = override.partition("=")
    if not sep or not all(part.strip() for part in name.split(".")):
        raise SettingError("an override is written name.part=value", f"--set {override}", "For example --set label.gamma=0.3")
    keys, kind = _find(model, name.strip())
    value = _read(_node(text, kind, name.strip()), kind, _Place(name.strip()))
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)
    return value


# ---- types -------------------------------------------------------------------------------------------------------------


def _bare(kind: Any) -> tuple[Any, bool]:
    """A type without its constraints, and whether it may be null."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        [inner] = [part for part in get_args(kind) if part is not type(None)]
        return _bare(inner)[0], True
    return kind, kind is Any


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _field(model: type[BaseModel], key: str, place: _Place, node: yaml.Node) -> Any:
    """The type of a setting in a section. Raises SettingError that suggests the nearest name."""
    if key not in model.model_fields:
        where = place.below("{}").name
        elsewhere = [] if place.name else list(_elsewhere(model, key))
        if elsewhere:
            raise place.below(key).error("unknown setting", node, f"Did you mean {' or '.join(map(repr, elsewhere[:4]))}?")
        hint = nearest(key, model.model_fields, f"Known here: {', '.join(model.model_fields)}", f"Did you mean '{where}'?")
        raise place.below(key).error("unknown setting", node, hint)
    return model.model_fields[key].annotation


def _elsewhere(model: type[BaseModel], key: str, before: str = "") -> Iterator[str]:
    """Dotted names of the settings in sections below whose last part is `key`."""
    for name, field in model.model_fields.items():
        inner, _ = _bare(field.annotation)
        if _is_section(inner):
            if key in inner.model_fields:
                yield f"{before}{name}.{key}"
            yield from _elsewhere(inner, key, f"{before}{name}.")


def _find(model: type[BaseModel], name: str) -> tuple[list[str], Any]:
    """The keys on the way to a dotted name, and its type. The names of labels and resources may hold dots themselves."""
    keys: list[str] = []
    kind: Any = model
    rest, place, nothing = name, _Place(), yaml.ScalarNode("", "")
    while rest:
        if _is_section(kind):
            key, _, rest = rest.partition(".")
            kind, _ = _bare(whole := _field(kind, key, place, nothing))
            place = place.below(key)
            if not rest:
                return [*keys, key], whole
        elif get_origin(kind) is dict:
            value = get_args(kind)[1]
            split = value is Any or _is_section(value)
            key, rest = (rest.partition(".")[0], rest.partition(".")[2]) if split else (rest, "")
            kind, place = value, place.below(key) if split else place
        elif kind is Any:
            key, _, rest = rest.partition(".")
        elif get_origin(kind) is tuple and _is_section(get_args(kind)[0]):  # an entry of a list is found by its name
            key, _, rest = rest.partition(".")
            kind, place = get_args(kind)[0], place.below(key)
            if not rest:
                raise SettingError("is one entry of a list", name, f"Write {place.name}.SETTING=value, or the whole list")
        else:
            raise SettingError("unknown setting", name, f"'{place.name}' is one setting: write {place.name}=value")
        keys.append(key)
    return keys, kind


# ---- values ------------------------------------------------------------------------------------------------------------


def _node(text: str, kind: Any, name: str) -> yaml.Node:
    """The text of an override as a node: a YAML list or mapping where the setting may hold one, else one scalar."""
    bare, _ = _bare(kind)
    nested = _is_section(bare) or get_origin(bare) in (dict, tuple) or bare is Any
    if nested and text.lstrip().startswith(("[", "{")):
        try:
            node = yaml.compose(text, Loader=yaml.BaseLoader)
        except (yaml.YAMLError, RecursionError) as error:
            raise SettingError("the value is not YAML", name, "Check its brackets and quotes") from error
        _refuse_size(node, _Place(name))
        if text[node.end_mark.index :].strip():
            raise SettingError(f"text stands behind the brackets (got {text!r})", name, "Leave it out, or close them at the end")
        return node
    if text in ('""', "''") and bare in (str, Any):
        return yaml.ScalarNode("", "", style='"')  # the way to write an empty text where a shell would eat it
    if bare is not Any and _QUOTED.fullmatch(text):
        what = f"the value stands in quotes (got {text})"
        raise SettingError(what, name, "Leave them out. If they belong to the text, write it in a file for --config")
    return yaml.ScalarNode("", text)


def _read(node: yaml.Node, kind: Any, place: _Place) -> Any:
    """The value of a node, by the type of its setting."""
    bare, nullable = _bare(kind)
    _refuse_tag(node, place)
    if _is_plain(node) and node.value in _NULLS:
        if nullable:
            return None
        raise place.error("cannot be null", node, "Leave it out for the value it has, or write a value")
    if _is_plain(node) and not node.value and (place.file is not None or (nullable and bare is str)):
        remedy = 'Write "" for an empty text' + (", or null for none" if nullable else "")
        raise place.error("has no value; in a file what follows # is a comment" if place.file else "is empty", node, remedy)
    if bare is Any:
        return _free(node, place)
    if _is_section(bare):
        return _section(node, bare, place)
    if get_origin(bare) is dict:
        return _mapping(node, get_args(bare)[1], place)
    if get_origin(bare) is tuple:
        return _list(node, get_args(bare), place)
    return _scalar(node, bare, place)


def _refuse_tag(node: yaml.Node, place: _Place) -> None:
    if node.tag and node.tag not in {f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")}:
        raise place.error(f"has the YAML tag {node.tag}", node, "Leave it out: the setting itself has a type")


def _refuse_size(node: yaml.Node, place: _Place) -> None:
    """Raise SettingError for a document of more parts than any has. A few lines can repeat each other without end by aliases."""
    sizes: dict[int, int] = {}

    def size(part: yaml.Node) -> int:
        if id(part) not in sizes:
            sizes[id(part)] = 1  # while it is counted: an alias may lead back to it
            inner = part.value if isinstance(part, yaml.CollectionNode) else []
            children = [child for entry in inner for child in (entry if isinstance(entry, tuple) else (entry,))]
            sizes[id(part)] = 1 + sum(map(size, children))
        return sizes[id(part)]

    if size(node) > _MOST_PARTS:
        raise place.error(f"has more than {_MOST_PARTS} parts", node, "Leave out the aliases (*name), which repeat them")


def _refuse_unwritable(text: str, node: yaml.Node, place: _Place) -> None:
    """Raise SettingError for text that no file of a run can hold: half a character, as a name that is not UTF-8 has."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise place.error(f"is no UTF-8 text (got {text!r})", node, "Write it in UTF-8, or rename the file that it names")


def _is_plain(node: yaml.Node) -> bool:
    """Whether a node is a scalar without quotes."""
    return isinstance(node, yaml.ScalarNode) and node.style is None


def _pairs(node: yaml.Node, place: _Place) -> list[tuple[str, yaml.Node, yaml.Node]]:
    """(name, its node, the node of its value) of each entry of a mapping. Raises SettingError for a name that stands twice."""
    if not isinstance(node, yaml.MappingNode):
        last = place.name.rpartition(".")[2]
        example = f"--set {place.name}.NAME=value" if place.file is None else f"`{last}: {{NAME: value}}`"
        raise place.error("holds several settings, not one value", node, f"Write {example}")
    found: dict[str, tuple[str, yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise place.error("has a name that is not text", key, "Write `name: value`")
        _refuse_unwritable(key.value, key, place)
        if key.value in found:
            first = found[key.value][1].start_mark.line + 1
            raise place.below(key.value).error(f"is given twice, first in line {first}", key, "Leave one of them")
        found[key.value] = (key.value, key, value)
    return list(found.values())


def _section(node: yaml.Node, model: type[BaseModel], place: _Place) -> dict[str, Any]:
    return {key: _read(value, _field(model, key, place, at), place.below(key)) for key, at, value in _pairs(node, place)}


def _mapping(node: yaml.Node, kind: Any, place: _Place) -> dict[str, Any]:
    return {key: _read(value, kind, place.below(key)) for key, _, value in _pairs(node, place)}


def _list(node: yaml.Node, kinds: tuple[Any, ...], place: _Place) -> list[Any]:
    """A YAML list, or text with commas, with every item of its type."""
    if isinstance(node, yaml.ScalarNode):
        parts = [part.strip() for part in node.value.split(",")] if node.value.strip() else []
        if any(not part or _QUOTED.fullmatch(part) for part in parts):
            raise place.error(f"has an item that is empty or in quotes (got {node.value!r})", node, "Write a,b,c or [a, b, c]")
        items: list[yaml.Node] = [yaml.ScalarNode("", part, node.start_mark, node.end_mark) for part in parts]
    elif isinstance(node, yaml.SequenceNode):
        items = node.value
    else:
        raise place.error("is a list, not a section", node, "Write a,b,c or [a, b, c]")
    kind = kinds[0]  # all items of a list are of one type
    return [_read(item, kind, place) for item in items]


def _free(node: yaml.Node, place: _Place, depth: int = 0) -> Any:
    """A value without a type: a JSON number, true, false, null or quoted text as in JSON, and else the text that is written."""
    _refuse_tag(node, place)
    if depth > _DEEPEST:
        raise place.error("is nested too deeply", node)
    if isinstance(node, yaml.SequenceNode):
        return [_free(item, place, depth + 1) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key: _free(value, place.below(key), depth + 1) for key, _, value in _pairs(node, place)}
    _refuse_unwritable(node.value, node, place)
    if not _is_plain(node):
        return node.value
    _refuse_comment(node, place)
    try:
        value = json.loads(node.value)
    except (ValueError, RecursionError):
        return node.value
    return node.value if isinstance(value, list | dict) or (isinstance(value, float) and not math.isfinite(value)) else value


def _scalar(node: yaml.Node, kind: Any, place: _Place) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise place.error("is one value, not a list or a section", node)
    text = node.value
    if kind is bool:
        if text.strip().lower() not in _TRUTH:
            raise place.error(f"Input should be true or false (got {text!r})", node)
        return _TRUTH[text.strip().lower()]
    if kind in (int, float):
        return _number(text.strip(), kind, place, node)
    assert kind is str or get_origin(kind) is Literal, kind
    _refuse_comment(node, place)
    _refuse_unwritable(text, node, place)
    return text


def _number(text: str, kind: type, place: _Place, node: yaml.Node) -> int | float:
    """A decimal number such as 8, 0.3, .5, 1e-4 or 16_384. Zeros in front, other bases and 1:30 are refused."""
    if _NUMBER.fullmatch(text) is None:
        finite = text.lower().lstrip("+-.") not in _NOT_FINITE
        wanted = "valid integer" if kind is int else "valid number" if finite else "finite number"
        raise place.error(f"Input should be a {wanted} (got {text!r})", node, "Write it in decimal digits: 8, 0.3 or 1e-4")
    exact = Decimal(text.replace("_", ""))
    if kind is float:
        if not math.isfinite(float(exact)):
            raise place.error(f"Input should be a finite number (got {text!r})", node)
        return float(exact)
    if exact.adjusted() > _MOST_DIGITS or exact != exact.to_integral_value():
        raise place.error(f"Input should be a valid integer (got {text!r})", node)
    return int(exact)


def _refuse_comment(node: yaml.Node, place: _Place) -> None:
    """Raise SettingError for plain text in a file with ` #` behind it: it may be a comment, or a part of the text."""
    end = node.end_mark if _is_plain(node) else None
    behind = end.buffer[end.pointer :].split("\n", 1)[0] if end and end.buffer else ""
    if behind.lstrip(" \t").startswith("#"):
        remedy = "Put the text in quotes, or the comment on a line of its own"
        raise place.error(f"what follows the text {node.value!r} may be a comment or belong to it", node, remedy)
