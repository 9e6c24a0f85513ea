"""The surface that users rely on, as one JSON document: verbs, settings, recipes, columns, stages, exit codes, names.

`python -m tests.surface --write` writes tests/surface.json anew. Without `--write` it prints the document. Help texts and
descriptions are not in it, as they may change at any time.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from json import dumps
from pathlib import Path
from signal import SIGKILL, SIGPIPE
from typing import Any

import typer.main

from jobs.cli import app
from jobs.screen.keeper import SIGNALS
from pipeline import contract, errors, recipes
from pipeline.config import Run
from pipeline.problems.benchmarks import BENCHMARKS
from pipeline.rounds.metrics import METRICS
from pipeline.stages import LABELS, MEASURE, PLAN

ROOT = Path(__file__).parent.parent
FILE = Path(__file__).parent / "surface.json"
LIMITS = ("enum", "const", "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "minItems", "maxItems")
_ABSENT = "(absent)"


def surface() -> dict[str, Any]:
    """The whole document, in plain JSON."""
    return {
        "verbs": _verbs(),
        "settings": _settings(Run.model_json_schema(), Run(name="-").model_dump(mode="json")),
        "recipes": {name: value for recipe in sorted(recipes.descriptions()) for name, value in _departures(recipe).items()},
        "columns": {column.name: _column(column) for column in contract.COLUMNS.values()},
        "stages": {stage.name: _stage(stage) for stage in PLAN},
        "chains": {"measure": list(MEASURE), "labels": list(LABELS)},
        "values": {
            "verdict": [str(verdict) for verdict in contract.Verdict],
            "reject_reason": [str(reason) for reason in contract.Reject],
            "regime": list(contract.Regime.NAMES),
        },
        "metrics": {f"{writer}/{m.name}": f"{m.unit}; {m.reduction}" for writer, rows in METRICS.items() for m in rows},
        "benchmarks": {name: f"{found.hub} {found.split} {dumps(found.options)}" for name, found in BENCHMARKS.items()},
        "exit_codes": {kind.__name__: kind.exit_code for kind in _family(errors.EgrsdError)}
        | {number.name: 128 + number for number in (*SIGNALS, SIGKILL, SIGPIPE)},
        "project": _project(),
        "environment": _environment(),
    }


def to_text(document: dict[str, Any]) -> str:
    """The document as JSON with one line for each item, so that a changed item is one line of a diff."""
    sections = []
    for section, items in document.items():
        if isinstance(items, list):
            sections.append(f" {dumps(section)}: {dumps(items)}")
        else:
            lines = [f"  {dumps(name)}: {dumps(item)}" for name, item in items.items()]
            sections.append(f" {dumps(section)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each item that is not the same in both documents."""
    a, b = _items(old), _items(new)
    return [f"{name}: {a.get(name, _ABSENT)} -> {b.get(name, _ABSENT)}" for name in a | b if a.get(name) != b.get(name)]


def _items(document: dict[str, Any]) -> dict[str, str]:
    pairs = ((s, items if isinstance(items, dict) else {"": items}) for s, items in document.items())
    return {f"{section} {name}".strip(): dumps(item) for section, items in pairs for name, item in items.items()}


def _verbs() -> dict[str, Any]:
    """Every argument and option, as `verb name`: flags, type, default, and whether one must be given or may be repeated."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {f"{verb} {one.name}": _parameter(one) for verb, command in sorted(commands.items()) for one in command.params}


def _parameter(parameter: Any) -> dict[str, Any]:
    kind = parameter.type_descriptor.annotation
    named = kind.__name__ if kind.__class__ is type else str(kind)
    facts = {"flags": [*parameter.opts, *parameter.secondary_opts], "type": named, "default": parameter.default}
    more = {name: getattr(parameter, name, None) for name in ("required", "multiple", "min", "max")}
    more |= {"nargs": parameter.nargs} if parameter.nargs != 1 else {}
    return facts | {name: value for name, value in more.items() if value not in (None, False)}


def _settings(schema: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Every setting by its dotted name: type, limits and default."""
    sections, found = schema["$defs"], {}

    def walk(section: dict[str, Any], values: Any, before: str) -> None:
        for name, field in section["properties"].items():
            inner = _section(field, sections)
            named = field.get("additionalProperties")
            if isinstance(named, dict) and "$ref" in named:  # sections by free names
                found[before + name] = {"type": "object", "default": values.get(name, _ABSENT)}
                walk(dict(sections[named["$ref"].rpartition("/")[2]]), None, f"{before}{name}.NAME.")
                continue
            default = values.get(name, _ABSENT) if isinstance(values, dict) else field.get("default", _ABSENT)
            if inner is None or default is None:
                found[before + name] = _type(field, sections) | {"default": default}
            if inner is not None:
                walk(inner, default if default != _ABSENT else None, f"{before}{name}.")

    walk(schema, {name: value for name, value in defaults.items() if name != "name"}, "")
    return found


def _section(field: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any] | None:
    """The section of settings that a field holds, required or optional. None for a field that is no section."""
    for part in (field, *field.get("anyOf", ())):
        if "$ref" in part:
            return dict(sections[part["$ref"].rpartition("/")[2]])
    return None


def _type(field: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """Type and limits of one field, without its title and description."""
    if "$ref" in field:
        return {"type": field["$ref"].rpartition("/")[2]}
    if "anyOf" in field:
        return {"any": [_type(part, sections) for part in field["anyOf"]]}
    found = {"type": field.get("type", "any")} | {name: field[name] for name in LIMITS if name in field}
    for name in ("items", "additionalProperties"):
        if isinstance(field.get(name), dict):
            found[name] = _type(field[name], sections)
    if "prefixItems" in field:
        found["prefixItems"] = [_type(part, sections) for part in field["prefixItems"]]
    return found


def _departures(recipe: str) -> dict[str, Any]:
    """The settings of a recipe that differ from the defaults, by the name `recipe setting`."""
    run = recipes.recipe(recipe)
    mine, plain = (_flat(one.model_dump(mode="json")) for one in (run, Run(name=run.name)))
    found = {name: value for name, value in mine.items() if plain.get(name, _ABSENT) != value}
    return {f"{recipe} {name}": value for name, value in found.items()}


def _flat(data: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in data.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) and value else {before + name: value}
    return flat


def _column(column: contract.Column) -> dict[str, Any]:
    facts = {"type": str(column.type), "writer": column.writer, "shape": column.shape, "unit": column.unit}
    facts |= {"nullable": column.nullable, "optional": column.optional}
    return {name: value for name, value in facts.items() if value}


def _stage(stage: contract.Stage) -> dict[str, Any]:
    facts = {"where": stage.where, "key": stage.key, "reads": list(stage.reads), "settings": list(stage.settings)}
    return facts | {"file": contract.schema(stage).names}


def _family(kind: type[errors.EgrsdError]) -> list[type[errors.EgrsdError]]:
    """The error and its subclasses that pipeline.errors defines. Ray makes more subclasses while a process runs."""
    ours = (child for child in kind.__subclasses__() if child.__module__ == errors.__name__)
    return [kind, *(found for child in ours for found in _family(child))]


def _project() -> dict[str, Any]:
    """Names of scripts, entry points and extras, and the required Python. The target of an entry point may change."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {
        "name": project["name"],
        "python": project["requires-python"],
        "scripts": sorted(project["scripts"]),
        "entry points": {group: sorted(names) for group, names in project["entry-points"].items()},
        "extras": sorted(project["optional-dependencies"]),
    }


def _environment() -> list[str]:
    """Names of the environment variables that the product reads, and of its own EGRSD_ variables."""
    found: set[str] = set()
    for path in (path for name in ("pipeline", "actors", "jobs") for path in (ROOT / name).rglob("*.py")):
        text = path.read_text()
        found |= set(re.findall(r"\bEGRSD_[A-Z_]+", text))
        for statement in ast.walk(ast.parse(text)):
            code = ast.unparse(statement) if isinstance(statement, ast.Assign | ast.Return) else ""
            if "os.environ" in code and not code.startswith("os.environ"):
                found |= set(re.findall(r"'([A-Z]+_[A-Z_]+)'", code))
    return sorted(found)


if __name__ == "__main__":
    text = to_text(surface())
    if "--write" in sys.argv[1:]:
        FILE.write_text(text)
    else:
        print(text, end="")
