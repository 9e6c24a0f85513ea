"""Somebody's own question, answered by policies of a run, and what the teacher makes of each answer when it sees a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import Run
from pipeline.contract import Engines, Failure, Generate, Policy, Sampling, Score
from pipeline.contract import Sequence as Scored
from pipeline.errors import EngineError, UserError
from pipeline.grader.verifier import grader_of
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.stages.chat import context_prompt, fits, student_prompt, turns_before
from pipeline.store.directory import Store

_PARTINGS = 3  # tokens of an answer that are named because the teacher finds them unlikely


@dataclass(frozen=True)
class Answered:
    """The answer of one policy. entropy: mean over its tokens, in nats, of the policy that wrote it.

    teacher_logprob, own_logprob: means over the tokens, in nats; the first is None without a reference. partings: the tokens that
    the teacher finds least likely compared with the policy, each (place, text, log-prob of the teacher - that of the policy).
    """

    policy: int
    text: str
    tokens: int
    finish_reason: str
    entropy: float
    own_logprob: float
    teacher_logprob: float | None = None
    teacher_entropy: float | None = None
    partings: tuple[tuple[int, str, float], ...] = ()


def prompt_of(run: Run, question: str) -> list[int]:
    """The ids that a policy reads. Raises UserError when the question leaves no room for an answer."""
    prompts = run.prompts
    ids = student_prompt(
        tokenizer_of(run.model), question, prompts.student, turns_before(None, prompts.system), prompts.student_thinking
    )
    _check_room(run, len(ids), "the question")
    return ids


def reference_prompt(run: Run, question: str, reference: str) -> list[int]:
    """The ids that the teacher reads: the question with the reference. Raises UserError when they leave no room."""
    prompts = run.prompts
    values = {"problem": question, "solution": reference, "answer": reference}
    tokenizer, before = tokenizer_of(run.model), turns_before(None, prompts.system)
    if prompts.teacher == prompts.student:  # a control: the teacher without the reference
        ids = student_prompt(tokenizer, question, prompts.teacher, before, prompts.teacher_thinking)
    else:
        ids = context_prompt(tokenizer, values, prompts.teacher, before, prompts.teacher_thinking)
    _check_room(run, len(ids), "the question with its reference")
    return ids


def _check_room(run: Run, length: int, what: str) -> None:
    if not fits(length, run.evaluation.max_new_tokens, run.model.max_model_len):
        room = f"{length} + {run.evaluation.max_new_tokens} new tokens > {run.model.max_model_len}"
        raise UserError(f"{what} is too long: {room}", "model.max_model_len", "Shorten it, or lower evaluation.max_new_tokens")


def answers(
    store: Store, run: Run, numbers: Sequence[int], prompts: tuple[list[int], list[int] | None], engines: Engines
) -> list[Answered]:
    """One answer of each policy, sampled as in an evaluation with the run's seed.

    prompts: the ids that a policy reads, and those of the teacher or None. Raises EngineError for an answer that failed.
    """
    s, (prompt, privileged), found = run.evaluation, prompts, list[Answered]()
    sampling = Sampling(s.temperature, s.top_p, s.top_k, s.max_new_tokens)
    for number in numbers:
        [written] = engines.generate([Generate(prompt, run.seed)], store.policy(number), sampling)
        if isinstance(written, Failure):
            raise EngineError(f"policy {number} gave no answer ({written.cause})", store.uri, "Ask again")
        scored = None
        if privileged is not None and len(written.tokens):
            [scored] = engines.score([Scored(privileged, written.tokens.tolist())], Policy(0))
        found.append(_answered(number, written, scored, tokenizer_of(run.model)))
    return found


def verdicts(run: Run, reference: str, found: Sequence[Answered]) -> tuple[str, list[tuple[str, str | None]]]:
    """What the run's grader makes of answers: the answer that it reads in the reference, and (verdict, answer read) of each.

    A reference in which the grader reads nothing counts as the answer itself.
    """
    grader = grader_of(run)
    [stated] = grader.grade([reference], [reference], ["stop"])
    answer = stated.answer or reference.strip()
    graded = grader.grade([one.text for one in found], [answer] * len(found), [one.finish_reason for one in found])
    return answer, [(str(one.verdict or one.reject), one.answer) for one in graded]


def _answered(number: int, written: Any, scored: Score | Failure | None, tokenizer: Any) -> Answered:
    ids = written.tokens.tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    plain = (number, text, len(ids), written.finish_reason, _mean(written.entropy), _mean(written.logprobs))
    if not isinstance(scored, Score):
        return Answered(*plain)
    apart = scored.logprobs - written.logprobs
    places = [int(place) for place in np.argsort(apart)[:_PARTINGS] if apart[place] < 0]
    partings = tuple((place, tokenizer.decode([ids[place]]), float(apart[place])) for place in places)
    return Answered(*plain, _mean(scored.logprobs), _mean(scored.entropy), partings)


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else 0.0
