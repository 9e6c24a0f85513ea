"""Stage `prompts`: a problem becomes the ids that the student sees and those that the privileged teacher sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.config import Run
from pipeline.contract import Reject, ShardInputs, ShardResult, Stage, schema
from pipeline.digest import digest
from pipeline.errors import ModelError, StoreError
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.problems.problem import Problem
from pipeline.stages.chat import context_prompt, fits, student_prompt, turns_before
from pipeline.stages.teachers import problem_prompt, teacher_of

UNTAUGHT = "untaught"  # a fact of evaluations that lack long prompts, since 2026-11-30: those of a teacher were not among them
ABSENT = "absent"  # a fact: other columns of the source of which no row of the shard has a value
_CARRIED = ("messages", "extra", "imported")  # columns of a shard in which a row has them


def prompts(problems: Sequence[Problem], run: Run, tokenizer: Any, taught: bool = True) -> pa.Table:
    """The student's and the teacher's prompt of every problem, as ids. A row without room for a response is rejected.

    A teacher that the run names gets its prompt when it scores, so that another one makes no trace stale. Here its prompt is only
    measured. taught: whether a teacher reads the rows. In an evaluation none does, so the length of its prompt rejects none: that
    would leave out the problems with long solutions, which are hard.
    """
    rows = []
    for item in problems:
        row: dict[str, Any] = {"prompt_id": prompt_id(item.index, item.problem, item.solution, item.answer, item.messages)}
        reject, detail = why_unusable(item, run)
        if reject is not None:
            rows.append(row | {"reject_reason": str(reject), "reject_detail": detail})
            continue
        try:
            student, teacher = _both(item, run, tokenizer)
            detail = _too_long(item, max(len(student), len(teacher or ()) if taught else 0), run)
        except ModelError as error:
            if item.messages is None:
                raise
            rows.append(row | {"reject_reason": str(Reject.BAD_MESSAGES), "reject_detail": error.what})
            continue
        if detail:
            rows.append(row | {"reject_reason": str(Reject.PROMPT_TOO_LONG), "reject_detail": detail})
            continue
        row |= {"problem": item.problem, "solution": item.solution, "answer": item.answer}
        row |= {name: value for name in _CARRIED if (value := getattr(item, name)) is not None}
        row |= {"problem_teacher": item.teacher} if item.teacher is not None else {}
        rows.append(row | {"prompt_tokens": student, "teacher_prompt_tokens": teacher})
    return pa.Table.from_pylist(rows, schema=schema(STAGE, {name for row in rows for name in row}))


def prompt_id(index: int, problem: str | None, solution: str | None, answer: str | None, messages: str | None) -> str:
    """The key of a prompt: a hash of its place in the source and its texts. `messages` counts where there are some."""
    parts = [index, problem, solution, answer, *([messages] if messages is not None else [])]
    return digest("\n".join(map(str, parts)))


def why_unusable(item: Problem, run: Run) -> tuple[Reject | None, str]:
    """Why a row of the source cannot be used, and in which words. A missing solution counts where a teacher reads it."""
    if item.reject != Reject.MISSING_SOLUTION:
        return item.reject, item.detail
    where = f"{run.source.uri}, row {run.source.row_of(item.index)}"
    teacher = run.taught_by[teacher_of(run, {"problem_teacher": item.teacher}, where)]
    if run.needs_solution(teacher):
        return item.reject, item.detail
    return (Reject.MISSING_ANSWER, f"column '{run.source.answer}' is empty") if item.answer is None else (None, "")


def _too_long(item: Problem, longest: int, run: Run) -> str:
    """Why a row has no room for a response; "" when it has. `longest`: tokens of its longest prompt so far."""
    windows = [(longest, run.model.max_model_len, "max_model_len")]
    if run.teachers:
        problem = {name: getattr(item, name) for name in ("problem", "solution", "answer", "messages")}
        where = f"{run.source.uri}, row {run.source.row_of(item.index)}"
        name = teacher_of(run, {"problem_teacher": item.teacher}, where)
        teacher = run.teachers[name]
        if teacher.before_grading:
            window = run.model_of(teacher).max_model_len
            windows.append((len(problem_prompt(run, teacher, problem)), window, f"teachers.{name}.max_model_len"))
    for length, window, setting in windows:
        if not fits(length, run.rollout.max_new_tokens, window):
            return f"{length} prompt + {run.rollout.max_new_tokens} new tokens > {setting} {window}"
    return ""


def _both(item: Problem, run: Run, tokenizer: Any) -> tuple[list[int], list[int] | None]:
    """The ids of the student's prompt, and of the default teacher's. The latter is None where the run names its teachers.

    It is None too without the solution that it needs, as in an evaluation.
    """
    assert item.problem is not None
    settings = run.prompts
    before = turns_before(item.messages, settings.system)
    student = student_prompt(tokenizer, item.problem, settings.student, before, settings.student_thinking)
    if run.teachers or (item.solution is None and "{solution}" in settings.teacher):
        return student, None
    if settings.teacher == settings.student:  # a control: the teacher without the reference
        return student, student_prompt(tokenizer, item.problem, settings.teacher, before, settings.teacher_thinking)
    values = {"problem": item.problem, "solution": item.solution or "", "answer": item.answer or ""}
    return student, context_prompt(tokenizer, values, settings.teacher, before, settings.teacher_thinking)


def _absent(problems: Sequence[Problem], table: pa.Table) -> list[str]:
    """Names of the other columns of the source of which no row that goes on has a value. A reward gets None of them."""
    names = dict.fromkeys(name for item in problems for name in item.others)
    for extra in table["extra"].to_pylist() if names and "extra" in table.column_names else ():
        for name in json.loads(extra or "{}") if names else ():
            names.pop(name, None)
    return list(names)


def _compute(shard: ShardInputs) -> ShardResult:
    if shard.problems is None:
        raise StoreError("the source is not open", "stage prompts", "Run it through `egrsd stage prompts`")
    left_out = sum(bool(item.left_out) for item in shard.problems)
    taught = shard.place.where.startswith("rounds/")
    table = prompts(shard.problems, shard.run, tokenizer_of(shard.run.model), taught)
    facts: dict[str, Any] = {"left_out": left_out} if left_out else {}  # rows that lost a column, see source.carry_bytes
    facts |= {ABSENT: absent} if (absent := _absent(shard.problems, table)) else {}
    lacks = not taught and str(Reject.PROMPT_TOO_LONG) in table["reject_reason"].to_pylist()
    return ShardResult(table, facts | {UNTAUGHT: True} if lacks else facts)


STAGE = Stage(
    "prompts",
    "CPU",
    "prompt_id",
    reads=(),
    settings=(
        *("source", "model.path", "model.revision", "model.max_model_len", "prompts", "rollout.max_new_tokens"),
        *(f"teachers.*.{name}" for name in ("model", "revision", "max_model_len", "prompt", "template", "fallback")),
    ),
    compute=_compute,
    round_inputs=lambda _: ("problems",),
)
