"""One row of a source, read as a problem: text or chat messages, its solution and answer, imported traces, all other columns."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.answers.responses import stated_answer
from pipeline.config import Source
from pipeline.contract import Reject
from pipeline.problems.shape import Shape, is_conversation, is_parts, value_at, written_text

_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", re.ASCII)
_FORMULA = re.compile(r"[\\\d]")
_ASSERTS = re.compile(r"^\s*assert[ (]", re.MULTILINE)
_TURNS = ("system", "developer", "user", "assistant", "tool")
_DEEPEST = 200  # lists and objects inside one another, in a column that is carried


class Numeral(str):
    """A number of a JSON file as the file spells it."""

    __slots__ = ()


@dataclass(frozen=True)
class Problem:
    """One row of a source. When the row lacks what the recipe needs, `reject` is set and `detail` says what is missing.

    problem: its text; of a conversation the last user turn. messages: the conversation as JSON, where it has other turns.
    imported: traces that the source brings, one for each place in a group. extra: the other columns, as one JSON object.
    left_out: names of other columns that were too large. teacher: the teacher that the row names. others: names of the other
    columns of its source, also of those in which it has nothing.
    """

    index: int
    problem: str | None
    solution: str | None
    answer: str | None
    reject: Reject | None = None
    detail: str = ""
    messages: str | None = None
    imported: tuple[str, ...] | None = None
    extra: str | None = None
    left_out: tuple[str, ...] = ()
    teacher: str | None = None
    others: tuple[str, ...] = ()


def read_problem(index: int, row: Mapping[str, Any], shape: Shape, source: Source) -> Problem:
    """A raw row as a problem."""
    cell = value_at(row, shape.problem)
    task, messages, why = _conversation(cell, shape) if is_conversation(cell) else (_text(cell), None, "")
    worked, target = _written(row, shape.solution), _answer(row, shape)
    imported = _imported(value_at(row, shape.response)) if shape.response else None
    extra, left_out = _others(row, shape, source.carry_bytes)
    reject, detail = _rejected(row, shape, (task, worked, target), imported)
    if why:
        reject, detail = Reject.BAD_MESSAGES, why
    elif left_out and source.carry is not None and reject in (None, Reject.MISSING_SOLUTION):
        reject = Reject.EXTRA_TOO_LARGE
        detail = f"column '{left_out[0]}' is too large: source.carry_bytes {source.carry_bytes}"
    teacher = _text(value_at(row, shape.teacher)) if shape.teacher else None
    others = tuple(map(clean, shape.other))
    return Problem(index, task, worked, target, reject, detail, messages, imported, extra, left_out, teacher, others)


def _rejected(
    row: Mapping[str, Any], shape: Shape, texts: tuple[str | None, str | None, str | None], imported: tuple[str, ...] | None
) -> tuple[Reject | None, str]:
    """Why a row cannot be used, and in which words. (None, "") when it has everything."""
    task, worked, target = texts
    if shape.response and task is not None and not imported:
        return Reject.EMPTY_RESPONSE, f"column '{shape.response}' holds no trace"
    for value, column, reject in (
        (task, shape.problem, Reject.MISSING_PROBLEM),
        (worked, shape.solution, Reject.MISSING_SOLUTION),
        (target, shape.answer, Reject.MISSING_ANSWER),
    ):
        if reject == Reject.MISSING_SOLUTION and shape.lacks:
            return reject, shape.lacks
        if value is None and column:
            return reject, _why_missing(value_at(row, column), column)
    return None, ""


def _why_missing(value: Any, column: str) -> str:
    if isinstance(value, str) and value.strip():
        return f"column '{column}' holds no complete \\boxed{{...}} and no ####"
    if is_conversation(value):
        return f"column '{column}' holds messages whose last turn is no text of the assistant"
    if isinstance(value, (list, dict)):
        return f"column '{column}' holds a {type(value).__name__}, not text"
    return f"column '{column}' is empty"


def _conversation(turns: list[Mapping[str, Any]], shape: Shape) -> tuple[str | None, str | None, str]:
    """(its last user turn, the turns as JSON, "") of chat messages, or (None, None, why they cannot be used).

    A last turn of the assistant is left out where a setting says what it is. The JSON is None for a single user turn.
    """
    told = []
    for number, turn in enumerate(turns, 1):
        text, why = _content(turn)
        if why:
            return None, None, f"column '{shape.problem}', turn {number}: {why}"
        told.append({"role": str(turn["role"]), "content": text})
    if told[-1]["role"] == "assistant" and shape.problem in (shape.response, shape.solution):
        told.pop()
    if not told or all(turn["role"] != "user" for turn in told):
        return None, None, f"column '{shape.problem}' has no user turn"
    if told[-1]["role"] == "assistant":
        column = shape.problem
        remedy = f"is it the reference (source.solution={column}) or a trace (source.response={column})?"
        return None, None, f"column '{column}' ends with a turn of the assistant: {remedy}"
    if told[-1]["role"] != "user":
        return None, None, f"column '{shape.problem}' ends with a turn of role '{told[-1]['role']}', not of the user"
    if not told[-1]["content"].strip():
        return None, None, f"column '{shape.problem}' ends with an empty user turn"
    return told[-1]["content"], None if len(told) == 1 else json.dumps(told, ensure_ascii=False), ""


def _content(turn: Mapping[str, Any]) -> tuple[str, str]:
    """(the text of one turn, ""), or ("", why it has none)."""
    content = turn.get("content")
    if turn["role"] not in _TURNS:
        return "", f"role '{turn['role']}' is none of {', '.join(_TURNS)}"
    if turn.get("tool_calls"):
        return "", "it calls tools, which is not supported"
    if content is not None and is_parts(content):
        return clean("".join(part["text"] for part in content)), ""
    if not isinstance(content, str):
        return "", f"its content is {'empty' if content is None else 'no text'}"
    return clean(content), ""


def _written(row: Mapping[str, Any], path: str) -> str | None:
    """A solution: text, a number, or the last assistant turn of chat messages. None without a column or without text."""
    value = value_at(row, path) if path else None
    written = written_text(value)
    return _text(value) if written is None or isinstance(value, Numeral) else clean(written)


def _answer(row: Mapping[str, Any], shape: Shape) -> str | None:
    """The answer: text, a number, a list of them (all of them are meant), or what a worked solution states.

    Tests of code stay as they are: several statements are a JSON list of texts.
    """
    cell = value_at(row, shape.answer)
    if (statements := _statements(cell)) is not None:
        return clean(cell if isinstance(cell, str) else json.dumps(statements, ensure_ascii=False))
    value = _opened(cell)
    if isinstance(value, list) and not is_conversation(value):
        parts = [_text(part) for part in value]
        return ", ".join(_ungrouped(part) for part in parts if part) if parts and all(parts) else None
    target = _written(row, shape.answer)
    if target is None or (shape.answer in (shape.solution, "solution") and not shape.bare):
        return target and stated_answer(target)
    marked = "\\boxed" in target or "####" in target or "</answer>" in target
    return stated_answer(target) if marked and not _is_test(target) else target


def _statements(cell: Any) -> list[str] | None:
    """The parts of a list of several texts, or of a JSON text of one, where a part asserts something. None for another cell."""
    parts = _list_of_json(cell) or cell
    several = isinstance(parts, list) and len(parts) > 1 and all(isinstance(part, str) for part in parts)
    return parts if several and any(map(_ASSERTS.search, parts)) else None


def _is_test(text: str) -> bool:
    """Whether a text is a program that asserts something. What looks like the mark of an answer is then a part of it."""
    if _ASSERTS.search(text) is None:
        return False
    try:
        with warnings.catch_warnings(action="ignore"):  # of the text's own escapes
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _list_of_json(cell: Any) -> list[Any] | None:
    """A cell whose text is a JSON list that begins with a text, as that list. None for another cell."""
    if not isinstance(cell, str) or not cell.startswith('["'):
        return None
    try:
        return json.loads(cell)  # type: ignore[no-any-return]
    except (ValueError, RecursionError):
        return None


def _opened(cell: Any) -> Any:
    """A cell whose text is a JSON list of texts with numbers or formulas, as that list. Another cell as it is."""
    parts = _list_of_json(cell)
    return parts if parts and all(isinstance(part, str) and _FORMULA.search(part) for part in parts) else cell


def _ungrouped(part: str) -> str:
    """A part of a list without thousands' commas, which would make two parts of it."""
    return part.replace(",", "") if _GROUPED.fullmatch(part) else part


def _imported(value: Any) -> tuple[str, ...] | None:
    """The traces of a cell: one text, the last assistant turn of chat messages, or a list of texts. None without any."""
    if isinstance(value, list) and not is_conversation(value):
        texts = tuple(clean(text) if isinstance(text, str) else "" for text in value)
        return texts if any(text.strip() for text in texts) else None
    text = written_text(value)
    return None if text is None else (clean(text),)


def _others(row: Mapping[str, Any], shape: Shape, most: int) -> tuple[str | None, tuple[str, ...]]:
    """The other columns as one JSON object of at most `most` bytes, and the names of those left out, the largest first."""
    parts, left_out = dict[str, str](), list[str]()
    for name in (name for name in shape.other if row.get(name) is not None):
        try:
            parts[clean(name)] = json.dumps(_plain(row[name]), ensure_ascii=False)
        except RecursionError:
            left_out.append(clean(name))
    sizes = {name: len(name.encode()) + len(text.encode()) + 6 for name, text in parts.items()}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if 2 + sum(sizes.values()) <= most:
            break
        left_out.append(name)
        del sizes[name]
    kept = ", ".join(f"{json.dumps(name, ensure_ascii=False)}: {parts[name]}" for name in parts if name in sizes)
    return (f"{{{kept}}}" if kept else None), tuple(left_out)


def _plain(value: Any, deep: int = 0) -> Any:
    """A cell as JSON can hold it: numbers of files as numbers, no infinity, and text for dates and the like.

    Raises RecursionError for a cell that is nested more deeply than _DEEPEST, wherever it is read.
    """
    if deep > _DEEPEST:
        raise RecursionError
    if isinstance(value, Numeral):
        try:
            return _plain(json.loads(value))
        except ValueError:  # NaN and Infinity are no JSON
            return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {clean(str(name)): _plain(part, deep + 1) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, deep + 1) for part in value]
    if isinstance(value, bytes):
        return None
    return value if value is None or isinstance(value, (bool, int)) else clean(str(value))


def _text(value: Any) -> str | None:
    """A cell as text, with 3 and 3.0 both as "3". None for a cell that is empty or holds a list or an object."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return None if not math.isfinite(value) else str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, Numeral):
        return value.removesuffix(".0")
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or isinstance(value, (list, dict)) or not str(value).strip():
        return None
    return clean(str(value))


def clean(text: str) -> str:
    """The text without halves of surrogate pairs: JSON allows them, and Arrow does not."""
    return text.encode("utf-8", "replace").decode()
