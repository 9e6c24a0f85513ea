"""Verdicts: a comparison of texts first, then mathematics in child processes that can be killed.

A row whose verifier stops or dies, or whose reference cannot be read, is rejected with the reason. An answer that takes for ever
is wrong when its reference alone is read in time: otherwise such answers would be a way out of being wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import regex

from pipeline import config
from pipeline.answers.responses import final_answer, spoken_part, stated_answer
from pipeline.answers.texts import decide
from pipeline.errors import SettingError
from pipeline.fit.machine import processors
from pipeline.grader.children import OVERRAN, STALL_S, Children, Outcome
from pipeline.grader.judging import GOLD_READ, serve

MAX_ANSWER_CHARS = 4096  # a longer "answer" is no answer, and a parser could take very long over it


@dataclass(frozen=True)
class Graded:
    """The result of one row.

    verdict: None only when `reject` says why there is none. A timeout has both.
    answer: what was read from the response and compared. None when nothing was read.
    gave_up: whether the verifier gave up on the answer. Its row is wrong, or rejected when the answer may not be the cause.
    """

    verdict: str | None
    reject: str | None = None
    detail: str = ""
    answer: str | None = None
    gave_up: bool = False


CORRECT, WRONG, UNPARSABLE, TRUNCATED = (Graded(word) for word in ("correct", "wrong", "unparsable", "truncated"))


@dataclass(frozen=True)
class Reading:
    """How answers are read and compared.

    fallback: whether the last formula or number counts where a response marks no answer.
    set_relations: whether `x < 3` and `(-\\infty, 3)` are the same.
    stall_s: seconds after which a child process whose processor time stands still is replaced.
    """

    fallback: bool = True
    set_relations: bool = True
    stall_s: float = STALL_S


READING = Reading()


class Grader:
    """Grades rows. Its child processes start at the first row that needs mathematics, and live until `close`.

    Any thread may use it, one at a time. Ray runs tasks outside the main thread, where math-verify's own timeout does not work.
    """

    def __init__(
        self,
        verifier: str = "math",
        answer_pattern: str | None = None,
        deadline_s: float = 5.0,
        processes: int = 0,
        reading: Reading = READING,
    ) -> None:
        """A grader without child processes; they start later.

        verifier: "math" or "exact".
        answer_pattern: regex whose last match has the answer as group 1.
        deadline_s: processor seconds that one answer may take; it gets them twice.
        processes: child processes; 0: as many as this process may use CPUs.

        Raises SettingError for a pattern that does not compile or has no group.
        """
        self._pattern = _compile(answer_pattern)
        self._mathematics = verifier == "math"
        self._deadline_s, self._reading = deadline_s, reading
        self._children = Children(serve, processes or processors(), ["math_verify"], reading.stall_s)

    def close(self) -> None:
        """End the child processes, also the busy ones. A grader that is used again starts new ones."""
        self._children.close()

    def grade(self, responses: Sequence[str], answers: Sequence[str | None], finish_reasons: Sequence[str]) -> list[Graded]:
        """One result per row, in order. A response that reached its cap is `truncated`. Raises ValueError on unequal lengths."""
        results: list[Graded | None] = []
        doubtful: dict[tuple[str, str], list[tuple[int, str]]] = {}  # traces of a group often agree: each pair is verified once
        for row, (response, answer, finish) in enumerate(zip(responses, answers, finish_reasons, strict=True)):
            graded = self._read(response, answer, finish)
            if isinstance(graded, Graded):
                results.append(graded)
            else:
                stated, pair = graded
                doubtful.setdefault(pair, []).append((row, stated))
                results.append(None)
        for graded, rows in zip(self._verify(list(doubtful)), doubtful.values(), strict=True):
            for row, stated in rows:
                results[row] = replace(graded, answer=stated)
        return [graded for graded in results if graded is not None]

    def unreadable(self, answers: Sequence[str]) -> list[int]:
        """The places of the reference answers that mathematics cannot read, so that only an equal text can be right."""
        if not self._mathematics:
            return []
        pairs = [decide("1", stated_answer(answer) or answer.strip()) for answer in answers]
        asked = {i: pair for i, pair in enumerate(pairs) if not isinstance(pair, bool)}
        return [
            i for i, found in zip(asked, self._verify(list(asked.values())), strict=True) if found.reject == "unreadable_answer"
        ]

    def _read(self, response: str, answer: str | None, finish: str) -> Graded | tuple[str, tuple[str, str]]:
        """The result when a comparison of texts decides it, else what was read and the pair (answer, reference) to verify."""
        if finish == "length":
            return TRUNCATED
        if answer is None or not answer.strip():
            return Graded(None, "missing_answer", "there is no reference answer to compare with")
        try:
            stated = self._extract(response)
        except TimeoutError:
            detail = f"grade.answer_pattern ran for more than {self._deadline_s:g} s"
            return Graded("timeout", "verifier_timeout", detail, gave_up=True)
        if stated is None or len(stated) > MAX_ANSWER_CHARS:
            return UNPARSABLE
        decided = decide(stated, stated_answer(answer) or answer.strip())
        if isinstance(decided, bool) or not self._mathematics:
            return replace(CORRECT if decided is True else WRONG, answer=stated)
        return stated, decided

    def _extract(self, response: str) -> str | None:
        if self._pattern is None:
            return final_answer(response, self._reading.fallback)
        last = None
        for last in self._pattern.finditer(spoken_part(response), timeout=self._deadline_s):  # noqa: B007
            pass
        return (last[1] or "").strip() or None if last is not None else None

    def _verify(self, pairs: list[tuple[str, str]]) -> list[Graded]:
        """One result per pair. A pair whose child overran is tried a second time, after all the others."""
        outcomes = self._ask(pairs)
        again = [i for i, outcome in enumerate(outcomes) if outcome.ended == OVERRAN]
        for i, outcome in zip(again, self._ask([pairs[i] for i in again]), strict=True):
            outcomes[i] = outcome
        return [self._graded(outcome) for outcome in outcomes]

    def _ask(self, pairs: list[tuple[str, str]]) -> list[Outcome]:
        return self._children.ask([(*pair, self._reading.set_relations, self._deadline_s) for pair in pairs])

    def _graded(self, outcome: Outcome) -> Graded:
        if not outcome.ended:
            word, detail = outcome.reply
            rejects = {"unreadable": "unreadable_answer", "failed": "verifier_error"}
            return (
                Graded(None, rejects[word], f"{detail}: set grade.verifier=exact or mend it") if word in rejects else Graded(word)
            )
        if outcome.ended == OVERRAN and GOLD_READ in outcome.notes:
            return replace(WRONG, gave_up=True)
        if outcome.ended == OVERRAN:
            detail = f"the reference answer alone took more than {self._deadline_s:g} processor seconds, twice"
            return Graded("timeout", "verifier_timeout", detail, gave_up=True)
        if outcome.ended == "stalled":
            detail = f"the verifier's process stood still for {self._reading.stall_s:g} s, twice"
            return Graded("timeout", "verifier_timeout", detail, gave_up=True)
        return Graded(None, "verifier_error", f"the verifier's process {outcome.ended}, twice", gave_up=True)


def grader_of(run: config.Run) -> Grader:
    """The one grader of this process for the settings of a run. A worker so starts its children once, and not once per shard."""
    grade = run.grade
    reading = Reading(reads_unmarked(run), grade.set_relations)
    return _shared(grade.verifier, grade.answer_pattern, grade.deadline_s, grade.processes, reading)


def reads_unmarked(run: config.Run) -> bool:
    """Whether an answer without a mark is read: as `grade.fallback` says, and with `auto` unless the prompt asks for a box."""
    if run.grade.fallback != "auto":
        return run.grade.fallback == "on"
    return "boxed" not in f"{run.prompts.student} {run.prompts.system}"


@lru_cache(maxsize=8)
def _shared(verifier: str, answer_pattern: str | None, deadline_s: float, processes: int, reading: Reading) -> Grader:
    return Grader(verifier, answer_pattern, deadline_s, processes, reading)


def _compile(pattern: str | None) -> regex.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise SettingError(f"is not a regular expression: {error}", "grade.answer_pattern") from error
    if compiled.groups < 1:
        raise SettingError("has no group", "grade.answer_pattern", r"Put parentheses around the answer, as in '#(-?\d+)$'")
    return compiled
