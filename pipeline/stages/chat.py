"""The student's prompt, the teacher's privileged prompt, and either of them followed by the ids of a response.

Both prompts are chat messages that the model's own template turns into ids. A problem may be the last turn of a conversation.
From there on only ids are joined. Nothing is decoded and tokenised again, so teacher and student see the same response ids.

A problem or a solution is text. Where it spells a control token, such as `<eos>`, that spelling becomes the ids of its letters.
Only the chat template and the prompt templates of the settings write control tokens.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from pipeline.config import Model
from pipeline.errors import ModelError, SettingError
from pipeline.models.blueprint import settings_of
from pipeline.models.stops import stop_ids
from pipeline.models.tokenizers.tokenizer import check_template, tokenizer_of
from pipeline.stages.template import render

_FIELD = re.compile(r"(\{problem\}|\{solution\}|(?<!\\boxed)\{answer\}|\{feedback\})")  # \boxed{answer} is LaTeX for a person
_PRIVATE = range(0xE000, 0xF8FF)  # code points that no text has a meaning for


class Filled(NamedTuple):
    """A filled template: its text, and where in the text the values of the problem stand."""

    text: str
    foreign: list[tuple[int, int]]


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: str
    filled: Filled


def turns_before(messages: str | None, system: str | None) -> list[Turn]:
    """The turns before the last one of a conversation, which is JSON. None is a problem without other turns.

    The settings' `system` turn is put before a conversation that has none.
    """
    told = json.loads(messages)[:-1] if messages else []
    turns = [Turn(turn["role"], Filled(turn["content"], [(0, len(turn["content"]))])) for turn in told]
    own = system is not None and all(turn.role not in ("system", "developer") for turn in turns)
    return [Turn("system", Filled(system, [])), *turns] if own and system is not None else turns


def fill(template: str, problem: str, solution: str = "", **more: str) -> Filled:
    """`template` with {problem}, {solution} and the fields of `more` replaced in one pass. All other braces stay as they are."""
    values, text, foreign = {"problem": problem, "solution": solution, **more}, "", []
    for place, piece in enumerate(_FIELD.split(template)):
        value = values.get(piece[1:-1]) if place % 2 else None
        if value is not None:
            foreign.append((len(text), len(text) + len(value)))
        text += piece if value is None else value
    return Filled(text, foreign)


def fields_of(template: str) -> set[str]:
    """The names of the fields that a teacher's template has."""
    return {piece[1:-1] for piece in _FIELD.findall(template)}


@lru_cache(maxsize=8)
def controls(tokenizer: Any) -> re.Pattern[str] | None:
    """A pattern of the texts that a tokenizer turns into control ids: special tokens, and added ones that its template writes.

    An added token of white space is text in any template (Gemma has one for each number of line ends). None for a tokenizer
    without control tokens.
    """
    added, template = tokenizer.added_tokens_decoder.values(), tokenizer.get_chat_template() if tokenizer.chat_template else ""
    texts = {token.content for token in added if token.special or (token.content.strip() and token.content in template)}
    longest_first = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def student_prompt(
    tokenizer: Any, problem: str, template: str = "{problem}", system: str | Sequence[Turn] | None = None, thinking: bool = True
) -> list[int]:
    """Prompt ids [P] of the student, who sees the problem only. The response begins right after them.

    system: the text of a system turn, or all turns before the problem.
    Raises SettingError for a template without {problem} or with {solution}, ModelError for an unusable chat template.
    """
    if "{problem}" not in template:
        raise SettingError("lacks {problem}", "prompts.student", "The student must see the problem")
    if "{solution}" in template:
        raise SettingError(
            "holds {solution}", "prompts.student", "Only the teacher may see it: move {solution} to prompts.teacher"
        )
    return _chat_ids(tokenizer, fill(template, problem), system, thinking)


def context_prompt(
    tokenizer: Any, values: Mapping[str, str], template: str, system: str | Sequence[Turn] | None = None, thinking: bool = True
) -> list[int]:
    """Prompt ids [Q] of a teacher, who sees the problem and something beside it (2605.13255, section 3: p_T(. | x, s*)).

    values: a text for each field of the template.

    Raises SettingError for a template that lacks {problem}, or that has no other field. Raises ModelError for an unusable chat
    template.
    """
    fields = fields_of(template)
    if "problem" not in fields or len(fields) < 2:
        lacking = "{problem}" if "problem" not in fields else "{solution}"
        raise SettingError(f"lacks {lacking}", "prompts.teacher", "The teacher must see the problem and {solution} or {answer}")
    return _chat_ids(tokenizer, fill(template, **values), system, thinking)


def splice(prompt: Sequence[int], response: Sequence[int]) -> list[int]:
    """Prompt ids [P] and response ids [T] -> [P + T]. The response begins at position P."""
    return [*prompt, *response]


def fits(prompt_len: int, max_new_tokens: int, max_model_len: int) -> bool:
    """Whether a prompt and the longest response to it fit into the model's window. All lengths are in tokens."""
    return prompt_len + max_new_tokens <= max_model_len


def _chat_ids(tokenizer: Any, filled: Filled, system: str | Sequence[Turn] | None, thinking: bool) -> list[int]:
    """The ids of a conversation that ends with one user message. Templates that know `enable_thinking` (Qwen3) read it."""
    check_template(tokenizer)
    before = turns_before(None, system) if isinstance(system, str | None) else system
    turns = [*before, Turn("user", filled)]
    texts, marked, mark = _mark(tokenizer, [turn.filled for turn in turns])
    messages = [{"role": turn.role, "content": text} for turn, text in zip(turns, texts, strict=True)]
    written = render(tokenizer, messages, add_generation_prompt=True, enable_thinking=thinking)
    pieces = re.split(f"{mark}([0-9]+){mark}", written) if marked else [written]
    return [
        int(token)
        for place, piece in enumerate(pieces)
        for token in (_spelled(tokenizer, marked[int(piece)]) if place % 2 else _ids(tokenizer, piece))
    ]


def _mark(tokenizer: Any, parts: Sequence[Filled]) -> tuple[list[str], list[str], str]:
    """The texts with a numbered mark for each control token that the data spells in them, these tokens, and the mark.

    A token that only half belongs to a problem counts too. The mark is a character that no text has.
    """
    pattern = controls(tokenizer)
    hits = [
        [
            hit
            for hit in (pattern.finditer(part.text) if pattern else ())
            if any(start < hit.end() and hit.start() < end for start, end in part.foreign)
        ]
        for part in parts
    ]
    mark = next(chr(code) for code in _PRIVATE if all(chr(code) not in part.text for part in parts)) if any(hits) else ""
    texts, marked = list[str](), list[str]()
    for part, found in zip(parts, hits, strict=True):
        text, done = "", 0
        for hit in found:
            text += f"{part.text[done : hit.start()]}{mark}{len(marked)}{mark}"
            marked.append(hit[0])
            done = hit.end()
        texts.append(text + part.text[done:])
    return texts, marked, mark


@lru_cache(maxsize=8)
def turn_ends(tokenizer: Any) -> tuple[str, ...]:
    """The control tokens that the chat template writes behind an assistant's turn: behind a last one, and before a user's.

    Templates of GLM 4 end a turn only with the role of the next one. That of GPT-OSS ends the last one in another way. Empty
    without a usable template.
    """
    try:
        check_template(tokenizer)
    except ModelError:  # who makes a prompt says what is wrong with it
        return ()
    mark, pattern, found = chr(_PRIVATE[0]), controls(tokenizer), list[str]()
    turns = [("user", "?"), ("assistant", mark), ("user", "?")]
    for number in (2, 3) if pattern is not None else ():
        with contextlib.suppress(ModelError):  # some templates write prompts only
            written = render(tokenizer, [{"role": role, "content": text} for role, text in turns[:number]])
            behind = pattern.match(written.partition(mark)[2].lstrip()) if pattern is not None else None
            found += [behind[0]] if behind else []
    return tuple(dict.fromkeys(found))


def turn_stops(model: Model) -> dict[int, str]:
    """Those of a chat template's `turn_ends` at which the model's traces end, by their ids."""
    tokenizer = tokenizer_of(model)
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    ends = {added[text]: text for text in turn_ends(tokenizer)}
    if ends.keys() <= {tokenizer.eos_token_id}:  # the model's files then tell nothing more
        return ends
    stops = stop_ids(model, settings_of(model))
    return {number: token for number, token in ends.items() if number in stops}


def unheard_end(model: Model) -> str | None:
    """A note when a model's traces run on past the token with which its chat template ends a turn."""
    ends = turn_ends(tokenizer_of(model))
    if not ends or turn_stops(model):
        return None
    return (
        f"note: {model.path}: its chat template ends a turn with {ends[0]}, and neither tokenizer nor model name that as an end: "
        "traces run on past it. If the model writes it, set it as eos_token in tokenizer_config.json"
    )


def response_ids(tokenizer: Any, text: str, stops: Collection[int] = ()) -> list[int]:
    """The ids of a trace that somebody else wrote, and the id with which the model ends one.

    It is the first of `stops`, which are the model's `turn_stops`, and else the tokenizer's end of sequence: training on an end
    that the model never writes would move it by much. The model itself writes tokens such as `<think>`, so these are read as what
    they are. A special token is read as text, but an end that the text already has counts once. Empty for a text without a word.
    Raises ModelError where no token ends a trace.
    """
    last = next(iter(stops), tokenizer.eos_token_id)
    if last is None:
        what = "neither its chat template nor its tokenizer names a token that ends a trace"
        raise ModelError(what, str(getattr(tokenizer, "name_or_path", "")), "Set eos_token in its tokenizer_config.json")
    for ended in dict.fromkeys((tokenizer.eos_token, *turn_ends(tokenizer))):
        text = text.rstrip().removesuffix(ended) if ended and text.rstrip().endswith(ended) else text
    if not text.strip():
        return []
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    pieces = re.split(f"({'|'.join(map(re.escape, sorted(special, key=len, reverse=True)))})", text) if special else [text]
    return [*(token for piece in pieces for token in (_spelled if piece in special else _ids)(tokenizer, piece)), last]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _spelled(tokenizer: Any, token: str) -> list[int]:
    """The ids of a control token's text. It is read in two halves, or letter by letter, so that no half is a control token."""
    pattern = controls(tokenizer)
    parts = [token[:1], token[1:]]
    if pattern is not None and any(pattern.search(part) for part in parts):
        parts = list(token)
    return [number for part in parts for number in _ids(tokenizer, part)]
