"""Real prompts of a run, as the models will see them: ids and text of the student's prompt and of each teacher's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import Run
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.problems.sources import ProblemSet
from pipeline.stages.prompts import prompts
from pipeline.stages.teachers import problem_prompt

SHOWN = 3  # problems
_LOOKED_AT = 64  # first rows among which they are found
_PROBLEM = ("problem", "solution", "answer", "messages")  # what a teacher's prompt is made from
_IDS, _LAST, _TEXT = 48, 12, 1600  # ids at the front and at the end that are written, and characters of the text


@dataclass(frozen=True)
class Shown:
    """One prompt: the row of its problem, who reads it, its ids [P], and the text that the tokenizer makes of the ids."""

    row: int
    reader: str
    ids: list[int]
    text: str

    def lines(self) -> list[str]:
        """The prompt for a terminal. Long ones are cut in the middle, which is said."""
        ids = self.ids if len(self.ids) <= _IDS + _LAST else [*self.ids[:_IDS], "...", *self.ids[-_LAST:]]
        text = self.text
        if len(text) > _TEXT:
            text = f"{text[: _TEXT // 2]}\n[{len(text) - _TEXT} characters left out]\n{text[-_TEXT // 2 :]}"
        head = f"prompt of row {self.row}, as the {self.reader} sees it: {len(self.ids)} ids"
        return [head, f"    ids  {' '.join(map(str, ids))}", *(f"    text {line}" for line in text.split("\n"))]

    def document(self) -> dict[str, Any]:
        """The whole prompt as plain data."""
        return asdict(self)


def show_prompts(problems: ProblemSet, run: Run, count: int = SHOWN) -> list[Shown]:
    """The prompts of the first `count` problems that can be asked, for student and teachers. Raises as the tokenizer does."""
    tokenizer, shown = tokenizer_of(run.model), list[Shown]()
    rows = problems.rows(range(min(_LOOKED_AT, len(problems))))
    made = prompts(rows, run, tokenizer).to_pylist()
    usable = [(row, one) for row, one in zip(rows, made, strict=True) if one["reject_reason"] is None]
    for row, one in usable[:count]:
        place = problems.source.row_of(row.index)
        shown.append(_shown(place, "student", one["prompt_tokens"], tokenizer))
        if one["teacher_prompt_tokens"] is not None:
            shown.append(_shown(place, "teacher", one["teacher_prompt_tokens"], tokenizer))
        for name, teacher in run.teachers.items():
            if teacher.before_grading and row.teacher in (None, name):
                ids = problem_prompt(run, teacher, {field: getattr(row, field) for field in _PROBLEM})
                shown.append(_shown(place, f"teacher '{name}'", ids, tokenizer_of(run.model_of(teacher))))
    return shown


def _shown(place: int, reader: str, ids: list[int], tokenizer: Any) -> Shown:
    return Shown(place, reader, list(ids), tokenizer.decode(ids, skip_special_tokens=False))
