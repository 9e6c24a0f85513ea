"""The student's prompt, the teacher's privileged prompt, and the splice of response ids behind either.

Both are chat messages wrapped by the model's own template and handled as ids from there on: text is never joined to text and
tokenised again, so teacher and student see the very same response ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from pipeline.errors import ModelError, SettingError

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


def template_hash(tokenizer: Any) -> str:
    """Hash of chat template, special tokens and vocabulary: equal hashes turn the same messages into the same ids."""
    parts = [tokenizer.chat_template, tokenizer.special_tokens_map, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local folder or a hub id. Raises ModelError when it cannot be loaded or has no chat template."""
    if _looks_local(path) and not os.path.isdir(path):
        raise ModelError("there is no such folder", path, "Set model.path to a folder with model and tokenizer, or to a hub id")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the tokenizer cannot be loaded: {cause}", path, "Check model.path, or unset HF_HUB_OFFLINE if it must be downloaded"
        ) from error
    _check_template(tokenizer)
    return tokenizer


def _looks_local(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1


def _check_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template",
            str(getattr(tokenizer, "name_or_path", "")),
            "Use an instruction-tuned model, or put a chat_template.jinja beside its tokenizer",
        )


def _chat_ids(tokenizer: Any, text: str, system: str | None, thinking: bool) -> list[int]:
    """`enable_thinking` reaches templates that know it (Qwen3); others never look."""
    from jinja2 import TemplateError

    _check_template(tokenizer)
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
