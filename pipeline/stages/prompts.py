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
from pipeline.stages.chat import fits, student_prompt, teacher_prompt


def prompts(problems: Sequence[Problem], run: Run, tokenizer: Any) -> pa.Table:
    """The student's and the teacher's prompt of every problem, as ids. A row without room for a response is rejected."""
    rows = []
    for item in problems:
        row: dict[str, Any] = {"prompt_id": digest(f"{item.index}\n{item.problem}\n{item.solution}\n{item.answer}")}
        if item.reject is not None:
            rows.append(row | {"reject_reason": str(item.reject), "reject_detail": item.detail})
            continue
        assert item.problem is not None
        student = student_prompt(tokenizer, item.problem, run.prompts.student, run.prompts.system, run.prompts.student_thinking)
        teacher = _privileged(item.problem, item.solution, run.prompts, tokenizer)
        longest = max(len(student), len(teacher or ()))
        if not fits(longest, run.rollout.max_new_tokens, run.model.max_model_len):
            detail = f"{longest} prompt + {run.rollout.max_new_tokens} new tokens > max_model_len {run.model.max_model_len}"
            rows.append(row | {"reject_reason": str(Reject.PROMPT_TOO_LONG), "reject_detail": detail})
            continue
        row |= {"problem": item.problem, "solution": item.solution, "answer": item.answer}
        rows.append(row | {"prompt_tokens": student, "teacher_prompt_tokens": teacher})
    return pa.Table.from_pylist(rows, schema=schema(STAGE))


def _privileged(problem: str, solution: str | None, settings: Prompts, tokenizer: Any) -> list[int] | None:
    """The ids of the teacher's prompt. None when there is no solution, as in an evaluation."""
    if solution is None:
        return None
    if settings.teacher == settings.student:  # a control: the teacher without the reference
        return student_prompt(tokenizer, problem, settings.teacher, settings.system, settings.teacher_thinking)
    return teacher_prompt(tokenizer, problem, solution, settings.teacher, settings.system, settings.teacher_thinking)


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
