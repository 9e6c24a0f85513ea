"""The student's prompt, the teacher's privileged prompt, and either of them followed by the ids of a response.

Both prompts are chat messages that the model's own template turns into ids. From there on only ids are joined. Nothing is
decoded and tokenised again, so teacher and student see the same response ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline.errors import SettingError
from pipeline.models.tokenizer import check_template
from pipeline.stages.template import render

_FIELD = re.compile(r"\{problem\}|\{solution\}")


def fill(template: str, problem: str, solution: str = "") -> str:
    """`template` with {problem} and {solution} replaced in one pass. All other braces stay as they are."""
    values = {"{problem}": problem, "{solution}": solution}
    return _FIELD.sub(lambda field: values[field[0]], template)


def student_prompt(
    tokenizer: Any, problem: str, template: str = "{problem}", system: str | None = None, thinking: bool = True
) -> list[int]:
    """Prompt ids [P] of the student, who sees the problem only. The response begins right after them.

    Raises SettingError for a template without {problem} or with {solution}, ModelError for an unusable chat template.
    """
    if "{problem}" not in template:
        raise SettingError("lacks {problem}", "prompts.student", "The student must see the problem")
    if "{solution}" in template:
        raise SettingError(
            "holds {solution}", "prompts.student", "Only the teacher may see it: move {solution} to prompts.teacher"
        )
    return _chat_ids(tokenizer, fill(template, problem), system, thinking)


def teacher_prompt(
    tokenizer: Any, problem: str, solution: str, template: str, system: str | None = None, thinking: bool = True
) -> list[int]:
    """Prompt ids [Q] of the teacher, who sees the problem and its reference solution (2605.13255, section 3: p_T(. | x, s*)).

    Raises SettingError for a template that lacks {problem} or {solution}, ModelError for an unusable chat template.
    """
    for field in ("{problem}", "{solution}"):
        if field not in template:
            raise SettingError(f"lacks {field}", "prompts.teacher", "The teacher must see problem and reference solution")
    return _chat_ids(tokenizer, fill(template, problem, solution), system, thinking)


def splice(prompt: Sequence[int], response: Sequence[int]) -> list[int]:
    """Prompt ids [P] and response ids [T] -> [P + T]. The response begins at position P."""
    return [*prompt, *response]


def fits(prompt_len: int, max_new_tokens: int, max_model_len: int) -> bool:
    """Whether a prompt and the longest response to it fit into the model's window. All lengths are in tokens."""
    return prompt_len + max_new_tokens <= max_model_len


def _chat_ids(tokenizer: Any, text: str, system: str | None, thinking: bool) -> list[int]:
    """The ids of one user message. Templates that know `enable_thinking` (Qwen3) read it, and others ignore it."""
    check_template(tokenizer)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = render(tokenizer, messages, add_generation_prompt=True, enable_thinking=thinking)
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
