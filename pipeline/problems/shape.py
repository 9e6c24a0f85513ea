"""The shape of a source: which column holds what. Settings decide. A look at the first rows does, where their column is missing.

Known by looking are chat messages, the Parquet files of verl (`prompt`, `reward_model.ground_truth`), and the columns of TRL and
ms-swift (`prompt`, `query`, `completion`, `response`, `solution`). A name with dots is a column, or a part of one.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.answers.responses import stated_answer
from pipeline.config import Source
from pipeline.errors import SourceError, first_line, nearest

LOOKED_AT = 64  # first rows of a source that are looked at
ROLES = ("problem", "solution", "answer", "response")
_PROBLEMS = ("messages", "prompt", "query", "question")
_ANSWERS = ("reward_model.ground_truth", "ground_truth", "expected_answer", "final_answer")
_WRITTEN = ("completion", "response")  # a reference solution, or a trace that somebody wrote: only a setting can say
_WORKED = ("extra_info.solution", "extra_info.answer")  # where verl's preparation scripts keep the worked solution
_SHORT = 40  # characters of a cell that may be an answer without its working


@dataclass(frozen=True)
class Shape:
    """The columns of a source by what they hold, each a name, a path with dots, or "" where there is none.

    bare: whether the answer is read as it stands, although its column is called `solution`.
    lacks: why there is no column of solutions, and what could be one. Empty where there is one, or where none is asked for.
    found: a sentence for each thing that looking has decided.
    other: columns that are carried beside these, with their names in the source. teacher: the column of teachers.
    """

    problem: str
    solution: str
    answer: str
    response: str = ""
    bare: bool = False
    lacks: str = ""
    found: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    teacher: str = ""

    def roots(self, names: Iterable[str]) -> list[str]:
        """The columns that hold problem, solution, answer and response, each once. Of a path it is the first part."""
        paths = [path for path in (self.problem, self.solution, self.answer, self.response, self.teacher) if path]
        return list(dict.fromkeys(path if path in names else path.partition(".")[0] for path in paths))

    def columns(self, names: Iterable[str]) -> list[str]:
        """The columns to read: those of `roots`, then the others that are carried, each once."""
        return list(dict.fromkeys([*self.roots(names), *(name for name in self.other if name in names)]))


class Look(NamedTuple):
    """What looking sees: the names of the columns, and the first rows. `where` names the file or the source in errors."""

    names: list[str]
    rows: Sequence[Mapping[str, Any]]
    where: str

    def has(self, path: str) -> bool:
        """Whether there is a column of this name, or a part of one in some of the rows."""
        return path in self.names or any(value_at(row, path) is not None for row in self.rows)

    def texts(self, path: str) -> list[str]:
        """The cells of a column that hold text, or that hold chat messages: then of each its last assistant turn."""
        return [text for row in self.rows if (text := written_text(value_at(row, path))) is not None]


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of the part of it that a path with dots names. None where there is none."""
    if path in row or "." not in path:
        return row.get(path)
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def is_conversation(value: Any) -> bool:
    """Whether a value looks like chat messages: a list of objects with a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) and "role" in turn for turn in value)


def written_text(value: Any) -> str | None:
    """A cell that somebody wrote: its text, or the last assistant turn of its messages. None for everything else."""
    if is_conversation(value):
        value = value[-1].get("content") if value[-1]["role"] == "assistant" else None
        if is_parts(value):
            value = "".join(part["text"] for part in value)
    return value if isinstance(value, str) and value.strip() else None


def is_parts(value: Any) -> bool:
    """Whether the content of a message is a list of parts that are all text."""
    return isinstance(value, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in value
    )


def understand(source: Source, look: Look, free: bool = True) -> Shape:
    """The shape of a source. A setting whose column is there decides; another one is found by looking when it is at its default.

    free: whether anything may be found by looking. Raises SourceError when a column that a setting names is not there, when none
    is found, or when several could be meant.
    """
    known = {role: _as_set(source, role, look, free) for role in ROLES}
    problem, found = known["problem"], list[str]()
    if problem is None:
        problem = _only(source, "problem", _PROBLEMS, look)
        found.append(f"the problem is column '{problem}'")
    response = known["response"] or ""
    shape = Shape(problem, known["solution"] or "", known["answer"] or "", response)
    if known["answer"] is None:
        shape, said = _with_answer(source, shape, look)
        found += said
    if known["solution"] is None and not shape.bare:
        shape, said = _with_solution(shape, look)
        found += said
    if known["solution"] is None and not shape.solution:
        shape = replace(shape, lacks=_lacks(source, shape, look))
    if source.teacher and not look.has(source.teacher):
        raise missing(source, "teacher", look)
    return replace(shape, found=tuple(found), teacher=source.teacher)


def _as_set(source: Source, role: str, look: Look, free: bool) -> str | None:
    """The column that a setting names. None when it is at its default, and there is no such column.

    Raises SourceError when another one is not there.
    """
    path = getattr(source, role)
    if not path or look.has(path):
        return str(path)
    if free and path == type(source).model_fields[role].default and not _misspelled(path, look.names):
        return None
    raise missing(source, role, look)


def _misspelled(name: str, names: Sequence[str]) -> bool:
    """Whether a column has nearly this name. Then nothing is guessed in its place."""
    known = {*_PROBLEMS, *_ANSWERS, *_WRITTEN, *ROLES}
    return bool(difflib.get_close_matches(name, [other for other in names if other not in known], n=1, cutoff=0.75))


def missing(source: Source, role: str, look: Look) -> SourceError:
    """The error of a source without the column that a setting names. A nested column is listed by its parts."""
    path, there = getattr(source, role), _paths(look)
    root, _, rest = path.partition(".")
    if rest and root in look.names:
        parts = ", ".join(part.partition(".")[2] for part in there if part.startswith(f"{root}.")) or "none"
        what = f"column '{root}' has no part '{rest}' in its first {len(look.rows)} rows; there are: {parts}"
        return SourceError(what, look.where, f"Set source.{role} to the path that holds it")
    roots = Counter(other.partition(".")[0] for other in there)
    words = {root: other for other in there if roots[root := other.partition(".")[0]] == 1}
    words |= {other.rpartition(".")[2]: other for other in reversed(there)}
    near = difflib.get_close_matches(path, list(words), n=1)
    remedy = f"Set source.{role}={words[near[0]]}?" if near else f"Set source.{role} to the column that holds it"
    return SourceError(f"has no column '{path}'; there are: {', '.join(there)}", look.where, remedy)


def _paths(look: Look) -> list[str]:
    """What a setting may name, sorted: columns, and in the place of a column of objects its parts."""
    found = set[str]()
    for name in look.names:
        parts = {part for row in look.rows if isinstance(row.get(name), Mapping) for part in row[name]}
        found |= {f"{name}.{part}" for part in parts} or {name}
    return sorted(found)


def _only(source: Source, role: str, candidates: Sequence[str], look: Look) -> str:
    """The one candidate that is there. Raises SourceError when there is none, or when there are several."""
    there = [path for path in candidates if look.has(path)]
    if not there:
        raise missing(source, role, look)
    if len(there) > 1:
        listed = " or ".join(f"'{path}'" for path in there)
        raise SourceError(f"its {role} could be {listed}", look.where, f"Set source.{role}={there[0]}, or another one")
    return there[0]


def _with_answer(source: Source, shape: Shape, look: Look) -> tuple[Shape, list[str]]:
    """The shape with the column of answers. The column of solutions may state them, or hold nothing else."""
    if any(look.has(path) for path in _ANSWERS):
        path = _only(source, "answer", _ANSWERS, look)
        return replace(shape, answer=path), [f"the answer is '{path}'"]
    column = shape.solution or ("solution" if "solution" in look.names else "")
    texts = look.texts(column) if column else []
    if any(stated_answer(text) for text in texts):
        said = f"the answer is what '{column}' states: its last \\boxed{{}}, or what follows ####"
        return replace(shape, answer=column), [said]
    if column != "solution" or not texts or any(len(text.strip()) > _SHORT for text in texts):
        raise missing(source, "answer", look)
    lacks = f"column 'solution' holds answers without a working, such as {texts[0].strip()!r}" if source.solution else ""
    return replace(shape, answer=column, solution="", bare=True, lacks=lacks), [f"the answer is '{column}', as it stands"]


def _with_solution(shape: Shape, look: Look) -> tuple[Shape, list[str]]:
    """The shape with the column of solutions, where one of the others turns out to hold them too."""
    answers = look.texts(shape.answer)
    worked = all("####" in text or "\\boxed" in text for text in answers) and any(len(text) > _SHORT for text in answers)
    if worked and shape.answer != shape.response:
        return replace(shape, solution=shape.answer), [f"the reference solution is '{shape.answer}' too: it holds a working"]
    for path in _WORKED:
        pairs = [(written_text(value_at(row, path)), value_at(row, shape.answer)) for row in look.rows]
        known = [(text, str(answer)) for text, answer in pairs if text is not None and answer is not None]
        if known and all(len(text) > len(answer) and answer in text for text, answer in known):
            return replace(shape, solution=path), [f"the reference solution is '{path}', which contains the answer"]
    return shape, []


def _lacks(source: Source, shape: Shape, look: Look) -> str:
    """Why there is no column of solutions, with the settings that could name one."""
    if shape.lacks:
        return shape.lacks
    text = f"there is no column '{source.solution}'"
    could = [path for path in _WRITTEN if path in look.names and path != shape.response]
    cells = [value_at(row, shape.problem) for row in look.rows]
    ends = any(is_conversation(cell) and cell[-1]["role"] == "assistant" for cell in cells)
    could += [shape.problem] if ends and shape.response != shape.problem else []
    if could:
        text += f"; '{could[0]}' could be the reference (source.solution={could[0]}) or a trace (source.response={could[0]})"
    return text


def carried(names: Sequence[str], shape: Shape, source: Source, where: str) -> Shape:
    """The shape with the other columns, which rewards may want. `names`: the columns that can be written as JSON.

    A column that is read as solution or answer under another name is among them. Raises SourceError when `source.carry` names a
    column that is not there.
    """
    if unknown := [name for name in source.carry or () if name not in names]:
        hint = nearest(unknown[0], names, f"Columns: {', '.join(sorted(names))}", "Did you mean {}?")
        raise SourceError(f"has no column '{unknown[0]}' that could be carried (source.carry)", where, hint)
    own = {shape.problem, shape.response, "problem", "solution", "answer"}
    wanted = (name for name in names if name not in own)
    return replace(shape, other=tuple(name for name in wanted if source.carry is None or name in source.carry))


def listed(table: pa.Table, where: str) -> list[dict[str, Any]]:
    """The rows as Python's own values. Raises SourceError, with the columns, for values that Python has none for."""
    try:
        return as_written(table.to_pylist(), table.schema)
    except (OverflowError, ValueError) as error:
        names = ", ".join(repr(name) for name in table.column_names if not _is_readable(table.column(name)))
        if isinstance(error, UnicodeDecodeError):
            raise SourceError(f"column {names} holds text that is no UTF-8", where, "Write the file again as UTF-8") from error
        what = f"column {names} holds what Python has no value for, as a time outside the years 1 to 9999 ({first_line(error)})"
        raise SourceError(what, where, "Mend the unit of its times, or take the column out") from error


def as_written(rows: list[dict[str, Any]], schema: pa.Schema) -> list[dict[str, Any]]:
    """The rows, in place, with the shortest decimals for short floats at any depth: 1000.1 and not 1000.0999755859375."""
    for field in schema:
        if _holds(field.type, _is_short):
            for row in rows:
                row[field.name] = _shortest(row[field.name], field.type)
    return rows


def _shortest(value: Any, kind: pa.DataType) -> Any:
    if _is_short(kind) and isinstance(value, float | np.floating):
        return float(str(kind.to_pandas_dtype()(value)))
    if pa.types.is_struct(kind) and isinstance(value, dict):
        return value | {part.name: _shortest(value[part.name], part.type) for part in kind if part.name in value}
    if pa.types.is_map(kind) and isinstance(value, list):
        return [(name, _shortest(part, kind.item_type)) for name, part in value]
    inner = getattr(kind, "value_type", None)  # of a list of any kind
    return [_shortest(part, inner) for part in value] if isinstance(value, list) and inner is not None else value


def _is_short(kind: pa.DataType) -> bool:
    return bool(pa.types.is_float32(kind) or pa.types.is_float16(kind))


def _is_readable(column: pa.ChunkedArray) -> bool:
    try:
        column.to_pylist()
    except (OverflowError, ValueError):
        return False
    return True


def writable(schema: pa.Schema) -> list[str]:
    """The columns of a schema that can be written as JSON: those without bytes, which images and sounds have."""
    return [field.name for field in schema if not _holds(field.type, _is_bytes)]


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _holds(kind: pa.DataType, wanted: Callable[[pa.DataType], bool]) -> bool:
    """Whether a type is a wanted one, or has one in it, at any depth."""
    return wanted(kind) or any(_holds(kind.field(place).type, wanted) for place in range(kind.num_fields))
