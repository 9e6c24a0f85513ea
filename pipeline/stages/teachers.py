"""What each teacher of a run sees: its prompt for a problem or for one trace, with its own chat template. And its probe.

A teacher with the prompt `privileged` or `plain` sees the same for all traces of a problem. A `sibling` is another trace of the
group, verified as correct: it stands in for the reference. With `feedback` the teacher sees what the verifier said of the very
trace that it scores. Sibling and feedback exist only after grading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.config import Run, Teacher
from pipeline.config.teachers import template_of
from pipeline.contract import EngineFacts, Reject, Score, Seat, Verdict
from pipeline.digest import digest
from pipeline.errors import EngineError, SourceError, nearest
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.stages.chat import context_prompt, fits, student_prompt, turns_before
from pipeline.stages.tables import Draft

COLUMNS = ("teacher_name", "teacher_context", "teacher_context_tokens", "teacher_sibling", "teacher_logprob_gap")
PROBLEM = ("problem", "solution", "answer", "messages", "problem_teacher")  # columns that a teacher's prompt is made from
GRADED = ("response_text", "verdict", "extracted_answer")  # and those for sibling and feedback
_FEW = 8  # tokens of a shard that tell nothing about a teacher
_FOUND = {  # where a reward decided, which reads no answer
    Verdict.CORRECT: "It was found correct.",
    Verdict.WRONG: "It was found wrong.",
    Verdict.UNPARSABLE: "It was not judged: the reward that decides gave no value.",
}
_SAID = {
    Verdict.CORRECT: "The verifier read the answer {read} and found it correct.",
    Verdict.WRONG: "The verifier read the answer {read}, which is wrong.",
    Verdict.UNPARSABLE: "The verifier found no answer in it that can be read.",
    Verdict.TRUNCATED: "It was cut off at the longest length that is allowed, before it had an answer.",
    Verdict.TIMEOUT: "The verifier could not decide in time whether its answer {read} is correct.",
}


class Context(NamedTuple):
    """What a teacher sees of one trace. kind: how it came about. prompt: ids [Q]. sibling: trace_id of the sibling, or None."""

    kind: str
    prompt: list[int]
    sibling: str | None = None


@dataclass(frozen=True)
class Taught:
    """What the named teachers of a run are given of one shard.

    contexts: (teacher, what it sees) by row. seats: where each teacher answers. compared: the teachers whose weights the run's
    own engines have too, so that the gap between both is measured.
    """

    contexts: Mapping[int, tuple[str, Context | str]]
    seats: Mapping[str, Seat]
    compared: frozenset[str] = frozenset()

    def begin(self, draft: Draft) -> None:
        """Note in each row of a draft who scores it with which prompt. Rows without a context are rejected."""
        for row, (name, context) in self.contexts.items():
            if isinstance(context, str):
                draft.reject(row, Reject.NO_CONTEXT, context)
                continue
            seen = {"teacher_context": context.kind, "teacher_context_tokens": context.prompt, "teacher_sibling": context.sibling}
            draft.values[row] = {"teacher_name": name, **seen}

    def rows_of(self, name: str, live: Sequence[int]) -> list[int]:
        """The rows among `live` that a teacher scores."""
        return [row for row in live if self.contexts[row][0] == name]

    def prompt(self, row: int) -> list[int]:
        """The prompt under which a row is scored. Only for a row that has one."""
        context = self.contexts[row][1]
        assert not isinstance(context, str)
        return context.prompt


def teacher_of(run: Run, row: Mapping[str, Any], where: str = "") -> str:
    """The name of the teacher of a problem: the only one, or the one that its row names.

    Raises SourceError, with `where`, for a row that names nobody.
    """
    names = list(run.taught_by)
    if not (run.teachers and run.source.teacher):
        return names[0]
    name = row.get("problem_teacher")
    if name in names:
        return str(name)
    known = f"Teachers of this run: {', '.join(names)}"
    what = f"column '{run.source.teacher}' " + ("is empty" if name is None else f"names '{str(name)[:60]}', which is no teacher")
    raise SourceError(what, where or run.source.uri, known if name is None else nearest(str(name), names, known))


def compared(run: Run) -> frozenset[str]:
    """The teachers that answer on engines of their own, or at a server, with weights that the student's engines have too."""
    own = (run.model.path, run.model.revision)
    alike = {name for name, teacher in run.teachers.items() if (m := run.model_of(teacher)) and (m.path, m.revision) == own}
    return frozenset(name for name in alike if run.has_pool(run.teachers[name]))


def problem_prompt(run: Run, teacher: Teacher, problem: Mapping[str, Any], kind: str = "", **seen: str) -> list[int]:
    """The ids of a teacher's prompt. `problem` has the texts of its row, and `seen` what else the template may name.

    kind: what the teacher sees; empty: what its settings say. A fallback takes the templates of `prompts`.
    """
    settings, own = run.prompts, not kind or kind == teacher.prompt
    tokenizer, before = tokenizer_of(run.model_of(teacher)), turns_before(problem["messages"], settings.system)
    if own:
        template = template_of(teacher, settings.student, settings.teacher)
    else:
        template = settings.student if kind == "plain" else settings.teacher
    if (kind or teacher.prompt) == "plain" or template == settings.student:
        return student_prompt(tokenizer, problem["problem"], template, before, settings.teacher_thinking)
    values = {name: str(problem[name] or "") for name in ("problem", "solution", "answer")} | seen
    return context_prompt(tokenizer, values, template, before, settings.teacher_thinking)


def prompts_before(run: Run, prompts: pa.Table) -> list[tuple[str, list[int]] | None]:
    """(teacher, ids of its prompt) of every problem of a shard whose teacher needs no verdict. None for the other rows."""
    found: list[tuple[str, list[int]] | None] = []
    for row in _rows(prompts, (*PROBLEM, "reject_reason")):
        name = teacher_of(run, row) if row["reject_reason"] is None else ""
        teacher = run.taught_by[name] if row["reject_reason"] is None else None
        usable = teacher is not None and teacher.before_grading
        found.append((name, problem_prompt(run, teacher, row)) if usable and teacher is not None else None)
    return found


def contexts(tables: Mapping[str, pa.Table], run: Run, rows: Sequence[int]) -> dict[int, tuple[str, Context | str]]:
    """(teacher, what it sees) of the traces `rows` of a shard. The second is a text where there is nothing: it says why.

    A context has room when its prompt and the response fit into the teacher's window. The fallback stands in for one without.
    """
    rollout = tables["rollout"]
    problems, places = list(_rows(tables["prompts"], PROBLEM)), rollout["prompt_index"].to_pylist()
    lengths = rollout["response_tokens"].combine_chunks().value_lengths().to_pylist()
    graded = _graded(tables, run.grade.verdict_reward is not None)

    @cache
    def of_problem(place: int, kind: str) -> list[int]:
        """The prompt that all traces of a problem share."""
        return problem_prompt(run, run.taught_by[teacher_of(run, problems[place])], problems[place], kind)

    def possible(row: int, teacher: Teacher) -> Iterator[Context]:
        """What a teacher may see of a trace, the best first."""
        place = places[row]
        if teacher.before_grading:
            yield Context(teacher.prompt, of_problem(place, teacher.prompt))
        elif teacher.prompt == "sibling" and row in graded:
            right = {
                one["trace_id"]: one for r, one in graded.items() if places[r] == place and one["verdict"] == Verdict.CORRECT
            }
            for key in siblings(run.seed, graded[row]["trace_id"], right):
                yield Context("sibling", problem_prompt(run, teacher, problems[place], solution=right[key]["response_text"]), key)
        elif graded.get(row, {}).get("verdict"):
            yield Context("feedback", problem_prompt(run, teacher, problems[place], feedback=feedback(graded[row])))
        if teacher.fallback != "reject":
            yield Context(teacher.fallback, of_problem(place, teacher.fallback))

    found: dict[int, tuple[str, Context | str]] = {}
    for row in rows:
        name = teacher_of(run, problems[places[row]])
        window, why = run.model_of(run.taught_by[name]).max_model_len, f"teacher {name} has neither sibling nor verdict to see"
        for context in possible(row, run.taught_by[name]):
            if fits(len(context.prompt), lengths[row], window):
                found[row] = name, context
                break
            why = f"{len(context.prompt)} tokens that teacher {name} sees + {lengths[row]} of the response > its window {window}"
        else:
            found[row] = name, why
    return found


def feedback(graded: Mapping[str, Any]) -> str:
    """What the verifier, or the tests of the problem, said of a trace, in words for a teacher."""
    verdict = Verdict(graded["verdict"])
    if graded["extracted_answer"] is None and verdict in _FOUND and graded.get("by_reward"):
        return f"{_FOUND[verdict]} {graded.get('judged_said') or ''}".rstrip()
    return _SAID[verdict].replace("{read}", str(graded["extracted_answer"] or "(none)"))


def siblings(seed: int, key: str, others: Iterable[str]) -> list[str]:
    """The traces `others` in an order by seed, without the trace `key` itself. The first one with room is its sibling."""
    return sorted((other for other in others if other != key), key=lambda other: digest(f"sibling/{seed}/{key}/{other}"))


def refuse_degenerate(name: str, scores: Sequence[Score], facts: EngineFacts) -> None:
    """Raise EngineError for a teacher that gives every token the same log-prob: it is uniform (-log V), or constant.

    Some engines do so after they slept, or with weights that were never loaded. A teacher that is sure of every token is none.
    """
    values = np.concatenate([score.logprobs for score in scores]) if scores else np.empty(0)
    if len(values) < _FEW or float(np.ptp(values)) > 1e-5 or float(values.mean()) > -1e-2:
        return
    uniform = abs(float(values.mean()) + float(np.log(facts.vocab_size))) < 1e-2
    how = f"is uniform: -log V = {values.mean():.4g} nat" if uniform else f"is constant: {values.mean():.4g} nat"
    where = f"teachers.{name}" if name else "teacher"
    remedy = "Its weights are not loaded, or its engine is broken: check its model, its server and its log"
    raise EngineError(f"its log-prob {how} on each of {len(values)} tokens", where, remedy)


def _graded(tables: Mapping[str, pa.Table], by_reward: bool) -> dict[int, dict[str, Any]]:
    """Key, text and verdict of the traces that were graded, by row, and what tests said. Empty when no teacher needs verdicts.

    by_reward: whether a reward decided the verdicts.
    """
    if "grade" not in tables:
        return {}
    grades = _rows(tables["grade"], ("trace_id", "reject_reason", "verdict", "extracted_answer"))
    texts = tables["rollout"]["response_text"].to_pylist()
    told = _rows(tables["reward"], ("trace_id", "judged_said")) if "reward" in tables else [{} for _ in texts]
    parts = enumerate(zip(grades, texts, told, strict=True))
    more = {"by_reward": by_reward}
    return {
        row: grade | said | more | {"response_text": text} for row, (grade, text, said) in parts if grade["reject_reason"] is None
    }


def _rows(table: pa.Table, names: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of a table as rows. A column that it lacks is None."""
    return [dict.fromkeys(names) | row for row in table.select([n for n in names if n in table.column_names]).to_pylist()]
