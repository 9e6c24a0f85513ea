"""The student's prompt, the teacher's privileged prompt, and the splice of response ids behind either.

Both are chat messages wrapped by the model's own template and handled as ids from there on: text is never joined to text and
tokenised again, so teacher and student see the very same response ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline.errors import ModelError, SettingError
from pipeline.models.tokenizer import check_template

_FIELD = re.compile(r"\{problem\}|\{solution\}")


def fill(template: str, problem: str, solution: str = "") -> str:
    """`template` with {problem} and {solution} replaced, in one pass: braces in a problem or in the template stay as they are."""
    values = {"{problem}": problem, "{solution}": solution}
    return _FIELD.sub(lambda field: values[field[0]], template)


def student_prompt(
    tokenizer: Any, problem: str, template: str = "{problem}", system: str | None = None, thinking: bool = True
) -> list[int]:
    """Prompt ids [P] of the student, who sees the problem only. Ends where the response begins.

    Raises SettingError for a template without {problem} or with {solution}, ModelError for an unusable chat template.
    """
    if "{problem}" not in template:
        raise SettingError("lacks {problem}", "prompts.student", "The student cannot answer what it is not asked")
    if "{solution}" in template:
        raise SettingError("holds {solution}", "prompts.student", "Only the teacher may see it: move it to prompts.teacher")
    return _chat_ids(tokenizer, fill(template, problem), system, thinking)


def teacher_prompt(
    tokenizer: Any, problem: str, solution: str, template: str, system: str | None = None, thinking: bool = True
) -> list[int]:
    """Prompt ids [Q] of the teacher, who sees the problem and its reference solution (2605.13255, section 3: p_T(. | x, s*)).

    Raises SettingError for a template that lacks {problem} or {solution}, ModelError for an unusable chat template.
    """
    for field in ("{problem}", "{solution}"):
        if field not in template:
            raise SettingError(
                f"lacks {field}", "prompts.teacher", "The teacher scores with problem and reference solution in view"
            )
    return _chat_ids(tokenizer, fill(template, problem, solution), system, thinking)


def splice(prompt: Sequence[int], response: Sequence[int]) -> list[int]:
    """Prompt ids [P] then response ids [T], as ids -> [P + T]. Nothing is tokenised again, so positions P.. are the response."""
    return [*prompt, *response]


def fits(prompt_len: int, max_new_tokens: int, max_model_len: int) -> bool:
    """Whether a prompt and the longest response to it fit into the model's window; all in tokens."""
    return prompt_len + max_new_tokens <= max_model_len


def _chat_ids(tokenizer: Any, text: str, system: str | None, thinking: bool) -> list[int]:
    """`enable_thinking` reaches templates that know it (Qwen3); others never look."""
    from jinja2 import TemplateError

    check_template(tokenizer)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, enable_thinking=thinking)
    except TemplateError as error:
        raise ModelError(
            f"its chat template refuses the prompt: {error}", str(tokenizer.name_or_path), "Check prompts.system and the template"
        ) from error
    return [int(token) for token in ids]
