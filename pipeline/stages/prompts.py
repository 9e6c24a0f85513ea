"""Stage `prompts`: a problem becomes the ids that the student sees and those that the privileged teacher sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.config import Prompts, Run
from pipeline.contract import Reject, ShardInputs, ShardResult, Stage, schema
from pipeline.digest import digest
from pipeline.errors import StoreError
from pipeline.models.tokenizer import tokenizer_of
from pipeline.problems.sources import Problem
from pipeline.stages.chat import context_prompt, fits, student_prompt
from pipeline.stages.teachers import problem_prompt, teacher_of


def prompts(problems: Sequence[Problem], run: Run, tokenizer: Any) -> pa.Table:
    """The student's and the teacher's prompt of every problem, as ids. A row without room for a response is rejected.

    A teacher that the run names gets its prompt when it scores, so that another one makes no trace stale. Here its prompt is only
    measured.
    """
    rows = []
    for item in problems:
        row: dict[str, Any] = {"prompt_id": digest(f"{item.index}\n{item.problem}\n{item.solution}\n{item.answer}")}
        reject, detail = _unusable(item, run)
        if reject is not None:
            rows.append(row | {"reject_reason": str(reject), "reject_detail": detail})
            continue
        assert item.problem is not None
        student = student_prompt(tokenizer, item.problem, run.prompts.student, run.prompts.system, run.prompts.student_thinking)
        teacher = None if run.teachers else _privileged(item, run.prompts, tokenizer)
        if detail := _too_long(item, max(len(student), len(teacher or ())), run):
            rows.append(row | {"reject_reason": str(Reject.PROMPT_TOO_LONG), "reject_detail": detail})
            continue
        row |= {"problem": item.problem, "solution": item.solution, "answer": item.answer, "problem_teacher": item.teacher}
        rows.append(row | {"prompt_tokens": student, "teacher_prompt_tokens": teacher})
    return pa.Table.from_pylist(rows, schema=schema(STAGE, ("problem_teacher",) if run.source.teacher else ()))


def _unusable(item: Problem, run: Run) -> tuple[Reject | None, str]:
    """Why a row of the source cannot be used, and in which words. A missing solution counts where a teacher reads it."""
    if item.reject != Reject.MISSING_SOLUTION:
        return item.reject, item.detail
    teacher = run.taught_by[teacher_of(run, {"problem_teacher": item.teacher}, f"{run.source.uri}, row {item.index}")]
    if run.needs_solution(teacher):
        return item.reject, item.detail
    return (Reject.MISSING_ANSWER, f"column '{run.source.answer}' is empty") if item.answer is None else (None, "")


def _too_long(item: Problem, longest: int, run: Run) -> str:
    """Why a row has no room for a response; "" when it has. `longest`: tokens of its longest prompt so far."""
    windows = [(longest, run.model.max_model_len, "max_model_len")]
    if run.teachers:
        problem = {"problem": item.problem, "solution": item.solution, "answer": item.answer}
        name = teacher_of(run, {"problem_teacher": item.teacher}, f"{run.source.uri}, row {item.index}")
        teacher = run.teachers[name]
        if teacher.before_grading:
            window = run.model_of(teacher).max_model_len
            windows.append((len(problem_prompt(run, teacher, problem)), window, f"teachers.{name}.max_model_len"))
    for length, window, setting in windows:
        if not fits(length, run.rollout.max_new_tokens, window):
            return f"{length} prompt + {run.rollout.max_new_tokens} new tokens > {setting} {window}"
    return ""


def _privileged(item: Problem, settings: Prompts, tokenizer: Any) -> list[int] | None:
    """The ids of the teacher's prompt. None when it needs a solution and there is none, as in an evaluation."""
    assert item.problem is not None
    if item.solution is None and ("{solution}" in settings.teacher or settings.teacher == settings.student):
        return None
    if settings.teacher == settings.student:  # a control: the teacher without the reference
        return student_prompt(tokenizer, item.problem, settings.teacher, settings.system, settings.teacher_thinking)
    values = {"problem": item.problem, "solution": item.solution or "", "answer": item.answer or ""}
    return context_prompt(tokenizer, values, settings.teacher, settings.system, settings.teacher_thinking)


def _compute(shard: ShardInputs) -> ShardResult:
    if shard.problems is None:
        raise StoreError("the source is not open", "stage prompts", "Run it through `egrsd stage prompts`")
    return ShardResult(prompts(shard.problems, shard.run, tokenizer_of(shard.run.model)), {})


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
