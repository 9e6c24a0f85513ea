"""Whether two tokenizers give every id the same meaning, so that one model can score what another one wrote.

Ids are compared, and not `vocab_size`: models of one family pad it to different sizes. Chat templates may differ, as each model
gets its own.
"""

from __future__ import annotations

from typing import Any

from pipeline.config import Model, Run
from pipeline.errors import ModelError
from pipeline.models.tokenizers.tokenizer import tokenizer_of

_REMEDY = "Take a teacher of the student's family: response ids go to it as they are"


def shared_size(tokenizer: Any) -> int:
    """The number of ids from 0 to the last one that has a token. Rows of a model beyond it are padding."""
    return 1 + max(tokenizer.get_vocab().values())


def check_teachers(run: Run) -> None:
    """Raise ModelError, with the first difference, for a teacher whose tokenizer is not the student's in ids or ends."""
    student = tokenizer_of(run.model)
    for name, teacher in run.teachers.items():
        model: Model = run.model_of(teacher)
        another = (model.path, model.revision) != (run.model.path, run.model.revision)
        if another and (found := difference(student, tokenizer_of(model))):
            raise ModelError(
                f"its tokenizer is not the student's ({run.model.path}): {found}", f"teachers.{name}, {model.path}", _REMEDY
            )


def difference(student: Any, teacher: Any) -> str:
    """The first difference between two tokenizers in words: a token, a special token, the end of sequence. "" without one."""
    ours, theirs = (_by_id(tokenizer) for tokenizer in (student, teacher))
    for number in sorted(ours.keys() | theirs.keys()):
        if ours.get(number) != theirs.get(number):
            return f"id {number} is {_shown(ours.get(number))}, and for the teacher {_shown(theirs.get(number))}"
    if student.eos_token_id != teacher.eos_token_id:
        ends = [_shown(ids.get(t.eos_token_id)) for ids, t in ((ours, student), (theirs, teacher))]
        return (
            f"a response ends with id {student.eos_token_id} {ends[0]}, and for the teacher with {teacher.eos_token_id} {ends[1]}"
        )
    special = [{number for number, token in t.added_tokens_decoder.items() if token.special} for t in (student, teacher)]
    for number in sorted(special[0] ^ special[1]):
        whose = "the student" if number in special[0] else "the teacher"
        return f"id {number} {_shown(ours[number])} is a special token for {whose} only"
    return ""


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}


def _shown(token: str | None) -> str:
    return "nothing" if token is None else repr(token)
