"""Verdicts: a cheap comparison of texts first, then math-verify in a child process that can be killed.

A row whose verifier hangs, dies or fails is rejected with the reason, never graded wrong: a failure must not become a reward
of zero.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as DeadlineExceeded
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import regex
from pebble import ProcessExpired, ProcessPool

from pipeline import config
from pipeline.errors import SettingError
from pipeline.problems.answers import compare_texts, final_answer, stated_answer

MAX_ANSWER_CHARS = 4096  # a longer "answer" is babble: no parser should see it
CHILD_MEMORY_BYTES = 4 << 30  # 9**9**9 must end in the child's MemoryError, not in the machine's
_CPU_GRACE_S = 2.0


@dataclass(frozen=True)
class Graded:
    """One row's result. `verdict` is None only where `reject` says why there is none; a timeout has both. `answer` is what was
    read from the response and compared; None where nothing could be read, or was not looked for."""

    verdict: str | None
    reject: str | None = None
    detail: str = ""
    answer: str | None = None


CORRECT, WRONG, UNPARSABLE, TRUNCATED = (Graded(word) for word in ("correct", "wrong", "unparsable", "truncated"))


class Grader:
    """Grades rows. The child processes start with the first row that texts cannot decide and stay until `close`.

    Usable from any thread (Ray's workers run tasks outside the main one, where math-verify's own timeout does not work).
    """

    def __init__(
        self, verifier: str = "math", answer_pattern: str | None = None, deadline_s: float = 5.0, processes: int = 1
    ) -> None:
        """verifier: math or exact; answer_pattern: regex whose last group 1 is the answer; deadline_s: seconds per row.

        Raises SettingError for a pattern that does not compile or has no group.
        """
        self._pattern = _compile(answer_pattern)
        self._mathematics = verifier == "math"
        self._deadline_s, self._processes = deadline_s, processes
        self._pool: ProcessPool | None = None

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child processes, the busy ones too. The grader may be used again: it starts new ones."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def grade(self, responses: Sequence[str], answers: Sequence[str | None], finish_reasons: Sequence[str]) -> list[Graded]:
        """One result per row, in order. A response cut by its cap is truncated. ValueError on unequal lengths."""
        results: list[Graded | None] = []
        doubtful: dict[tuple[str, str], list[int]] = {}  # a group's traces often agree: verify a pair once
        for row, (response, answer, finish) in enumerate(zip(responses, answers, finish_reasons, strict=True)):
            graded = self._read(response, answer, finish)
            if isinstance(graded, tuple):
                doubtful.setdefault(graded, []).append(row)
                results.append(None)
            else:
                results.append(graded)
        for graded, ((found, _), rows) in zip(self._verify(list(doubtful)), doubtful.items(), strict=True):
            for row in rows:
                results[row] = replace(graded, answer=found)
        return [graded for graded in results if graded is not None]

    def _read(self, response: str, answer: str | None, finish: str) -> Graded | tuple[str, str]:
        """The result where texts decide, else the pair (answer, reference) to verify."""
        if finish == "length":
            return TRUNCATED
        if answer is None or not answer.strip():
            return Graded(None, "missing_answer", "there is no reference answer to compare with")
        try:
            found = self._extract(response)
        except TimeoutError:
            return Graded("timeout", "verifier_timeout", f"grade.answer_pattern ran for more than {self._deadline_s:g} s")
        if found is None or len(found) > MAX_ANSWER_CHARS:
            return UNPARSABLE
        reference = stated_answer(answer) or answer.strip()
        same = compare_texts(found, reference)
        if same is None and self._mathematics:
            return found, reference
        return replace(CORRECT if same else WRONG, answer=found)

    def _extract(self, response: str) -> str | None:
        if self._pattern is None:
            return final_answer(response)
        last = None
        for last in self._pattern.finditer(response, timeout=self._deadline_s):  # noqa: B007
            pass
        return (last[1] or "").strip() or None if last is not None else None

    def _verify(self, pairs: list[tuple[str, str]]) -> list[Graded]:
        """One result per pair. A child that dies idle breaks the pool for everyone: those pairs get one more try."""
        results = self._attempt(pairs)
        broken = [i for i, result in enumerate(results) if result is None]
        if broken:
            self.close()
            for i, result in zip(broken, self._attempt([pairs[i] for i in broken]), strict=True):
                results[i] = result
        lost = Graded(None, "verifier_error", "the verifier's processes keep dying")
        return [result or lost for result in results]

    def _attempt(self, pairs: list[tuple[str, str]]) -> list[Graded | None]:
        if not pairs:
            return []
        if self._pool is None or not self._pool.active:
            self.close()
            self._pool = _start_pool(self._processes)
        futures = [self._pool.schedule(judge, args=(*pair, self._deadline_s), timeout=self._deadline_s) for pair in pairs]
        return [self._collect(future) for future in futures]

    def _collect(self, future: Future[str]) -> Graded | None:
        """The result of one verification; None when the pool broke before it ran."""
        try:
            return Graded(future.result())
        except BrokenProcessPool:
            return None
        except DeadlineExceeded:
            return Graded("timeout", "verifier_timeout", f"math-verify ran for more than {self._deadline_s:g} s")
        except ProcessExpired as error:
            return Graded(None, "verifier_error", f"the verifier's process died with exit code {error.exitcode}")
        except Exception as error:  # whatever sympy raises on a hostile answer: kept with the row, which is rejected
            return Graded(None, "verifier_error", f"{type(error).__name__}: {error}"[:500])


def grader_of(grade: config.Grade) -> Grader:
    """The process-wide grader of these settings, so that a worker starts its children once, not per shard."""
    return _shared(grade.verifier, grade.answer_pattern, grade.deadline_s, grade.processes)


@lru_cache(maxsize=8)
def _shared(verifier: str, answer_pattern: str | None, deadline_s: float, processes: int) -> Grader:
    return Grader(verifier, answer_pattern, deadline_s, processes)


def judge(answer: str, reference: str, deadline_s: float) -> str:
    """'correct', 'wrong' or 'unparsable' by math-verify. Runs in a child, whose caller enforces the deadline.

    The CPU limit ends a child in a loop whose caller was killed and cannot end it any more. Raises what math-verify raises,
    and ValueError when the reference is not mathematics.
    """
    from math_verify import parse, verify

    used = resource.getrusage(resource.RUSAGE_SELF)
    budget = int(used.ru_utime + used.ru_stime + deadline_s + _CPU_GRACE_S)
    resource.setrlimit(resource.RLIMIT_CPU, (budget, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    # parsing_timeout=None: its timeout is an alarm signal, which hostile C code never looks at; the caller kills instead.
    gold = parse(_as_latex(reference), parsing_timeout=None)
    if all(isinstance(form, str) for form in gold):  # what does not parse comes back as text
        raise ValueError("the reference answer is not mathematics: set grade.verifier=exact")
    found = parse(_as_latex(answer), parsing_timeout=None)
    if all(isinstance(form, str) for form in found):
        return "unparsable"
    return "correct" if verify(gold, found, timeout_seconds=None, raise_on_error=True) else "wrong"


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


def _as_latex(answer: str) -> str:
    return answer if "$" in answer or "\\[" in answer or "\\(" in answer else f"${answer}$"


def _start_pool(processes: int) -> ProcessPool:
    """Children fork from a server that has math-verify loaded: one that was killed is replaced in milliseconds, not seconds."""
    context: Any = multiprocessing.get_context("forkserver")  # fork alone would copy Ray's and torch's locks in mid-air
    context.set_forkserver_preload(["math_verify"])
    return ProcessPool(max_workers=processes, initializer=_prepare_child, context=context)


def _prepare_child() -> None:
    import logging

    import math_verify  # noqa: F401 - before the first deadline starts to run

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
