"""Stage `prompts`: a problem becomes the ids that the student sees and those that the privileged teacher sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.config import Prompts, Run
from pipeline.contract import Reject, ShardInputs, ShardResult, Stage, schema
from pipeline.digest import digest
from pipeline.errors import ModelError, StoreError
from pipeline.models.tokenizer import tokenizer_of
from pipeline.problems.problem import Problem
from pipeline.stages.chat import fits, student_prompt, teacher_prompt, turns_before

_CARRIED = ("messages", "extra", "imported")  # columns of a shard in which a row has them


def prompts(problems: Sequence[Problem], run: Run, tokenizer: Any) -> pa.Table:
    """The student's and the teacher's prompt of every problem, as ids. A row without room for a response is rejected."""
    rows = []
    for item in problems:
        row: dict[str, Any] = {"prompt_id": prompt_id(item.index, item.problem, item.solution, item.answer, item.messages)}
        if item.reject is not None:
            rows.append(row | {"reject_reason": str(item.reject), "reject_detail": item.detail})
            continue
        try:
            student, teacher = _both(item, run.prompts, tokenizer)
        except ModelError as error:
            if item.messages is None:
                raise
            rows.append(row | {"reject_reason": str(Reject.BAD_MESSAGES), "reject_detail": error.what})
            continue
        longest = max(len(student), len(teacher or ()))
        if not fits(longest, run.rollout.max_new_tokens, run.model.max_model_len):
            detail = f"{longest} prompt + {run.rollout.max_new_tokens} new tokens > max_model_len {run.model.max_model_len}"
            rows.append(row | {"reject_reason": str(Reject.PROMPT_TOO_LONG), "reject_detail": detail})
            continue
        row |= {"problem": item.problem, "solution": item.solution, "answer": item.answer}
        row |= {name: value for name in _CARRIED if (value := getattr(item, name)) is not None}
        rows.append(row | {"prompt_tokens": student, "teacher_prompt_tokens": teacher})
    return pa.Table.from_pylist(rows, schema=schema(STAGE, {name for row in rows for name in row}))


def prompt_id(index: int, problem: str | None, solution: str | None, answer: str | None, messages: str | None) -> str:
    """The key of a prompt: a hash of its place in the source and its texts. `messages` counts where there are some."""
    parts = [index, problem, solution, answer, *([messages] if messages is not None else [])]
    return digest("\n".join(map(str, parts)))


def _both(item: Problem, settings: Prompts, tokenizer: Any) -> tuple[list[int], list[int] | None]:
    """The ids of the student's and of the teacher's prompt. The latter is None without a solution, as in an evaluation."""
    assert item.problem is not None
    before = turns_before(item.messages, settings.system)
    student = student_prompt(tokenizer, item.problem, settings.student, before, settings.student_thinking)
    if item.solution is None:
        return student, None
    if settings.teacher == settings.student:  # a control: the teacher without the reference
        return student, student_prompt(tokenizer, item.problem, settings.teacher, before, settings.teacher_thinking)
    return student, teacher_prompt(tokenizer, item.problem, item.solution, settings.teacher, before, settings.teacher_thinking)


def _compute(shard: ShardInputs) -> ShardResult:
    if shard.problems is None:
        raise StoreError("the source is not open", "stage prompts", "Run it through `egrsd stage prompts`")
    return ShardResult(prompts(shard.problems, shard.run, tokenizer_of(shard.run.model)), {})


STAGE = Stage(
    "prompts",
    "CPU",
    "prompt_id",
    reads=(),
    settings=("source", "model.path", "model.revision", "model.max_model_len", "prompts", "rollout.max_new_tokens"),
    compute=_compute,
    round_inputs=lambda _: ("problems",),
)
