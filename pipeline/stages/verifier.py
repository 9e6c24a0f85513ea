"""Verdicts: a cheap comparison of texts first, then math-verify in a child process that can be killed.

A row whose verifier hangs, dies or fails is rejected with the reason. It is never graded wrong, since a failure must not become
a reward of zero.
"""

from __future__ import annotations

import logging
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

MAX_ANSWER_CHARS = 4096  # a longer "answer" is no answer, and a parser could take very long over it
CHILD_MEMORY_BYTES = 4 << 30  # an answer such as 9**9**9 must not take the memory of the machine
_CPU_GRACE_S = 2.0


@dataclass(frozen=True)
class Graded:
    """The result of one row.

    verdict: None only when `reject` says why there is none. A timeout has both.
    answer: what was read from the response and compared. None when nothing was read.
    """

    verdict: str | None
    reject: str | None = None
    detail: str = ""
    answer: str | None = None


CORRECT, WRONG, UNPARSABLE, TRUNCATED = (Graded(word) for word in ("correct", "wrong", "unparsable", "truncated"))


class Grader:
    """Grades rows. Its child processes start at the first row that needs math-verify, and live until `close`.

    Any thread may use it. Ray runs tasks outside the main thread, where math-verify's own timeout does not work.
    """

    def __init__(
        self, verifier: str = "math", answer_pattern: str | None = None, deadline_s: float = 5.0, processes: int = 1
    ) -> None:
        """A grader without child processes; they start later.

        verifier: "math" or "exact".
        answer_pattern: regex whose last match has the answer as group 1.
        deadline_s: seconds per row.

        Raises SettingError for a pattern that does not compile or has no group.
        """
        self._pattern = _compile(answer_pattern)
        self._mathematics = verifier == "math"
        self._deadline_s, self._processes = deadline_s, processes
        self._pool: ProcessPool | None = None

    def close(self) -> None:
        """End the child processes, also the busy ones. A grader that is used again starts new ones."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def grade(self, responses: Sequence[str], answers: Sequence[str | None], finish_reasons: Sequence[str]) -> list[Graded]:
        """One result per row, in order. A response that reached its cap is `truncated`. Raises ValueError on unequal lengths."""
        results: list[Graded | None] = []
        doubtful: dict[tuple[str, str], list[int]] = {}  # traces of a group often agree: each pair is verified once
        for row, (response, answer, finish) in enumerate(zip(responses, answers, finish_reasons, strict=True)):
            graded = self._read(response, answer, finish)
            if isinstance(graded, tuple):
                doubtful.setdefault(graded, []).append(row)
                results.append(None)
            else:
                results.append(graded)
        for graded, ((stated, _), rows) in zip(self._verify(list(doubtful)), doubtful.items(), strict=True):
            for row in rows:
                results[row] = replace(graded, answer=stated)
        return [graded for graded in results if graded is not None]

    def _read(self, response: str, answer: str | None, finish: str) -> Graded | tuple[str, str]:
        """The result when a comparison of texts decides it, else the pair (answer, reference) to verify."""
        if finish == "length":
            return TRUNCATED
        if answer is None or not answer.strip():
            return Graded(None, "missing_answer", "there is no reference answer to compare with")
        try:
            stated = self._extract(response)
        except TimeoutError:
            return Graded("timeout", "verifier_timeout", f"grade.answer_pattern ran for more than {self._deadline_s:g} s")
        if stated is None or len(stated) > MAX_ANSWER_CHARS:
            return UNPARSABLE
        reference = stated_answer(answer) or answer.strip()
        same = compare_texts(stated, reference)
        if same is None and self._mathematics:
            return stated, reference
        return replace(CORRECT if same else WRONG, answer=stated)

    def _extract(self, response: str) -> str | None:
        if self._pattern is None:
            return final_answer(response)
        last = None
        for last in self._pattern.finditer(response, timeout=self._deadline_s):  # noqa: B007
            pass
        return (last[1] or "").strip() or None if last is not None else None

    def _verify(self, pairs: list[tuple[str, str]]) -> list[Graded]:
        """One result per pair. A child that dies while idle breaks its whole pool, so all pairs that broke get one more try."""
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
        """The result of one verification, or None when the pool broke before the verification ran."""
        try:
            return Graded(future.result())
        except BrokenProcessPool:
            return None
        except DeadlineExceeded:
            return Graded("timeout", "verifier_timeout", f"math-verify ran for more than {self._deadline_s:g} s")
        except ProcessExpired as error:
            return Graded(None, "verifier_error", f"the verifier's process died with exit code {error.exitcode}")
        except Exception as error:  # sympy may raise anything on a hostile answer: its row is rejected with the error
            return Graded(None, "verifier_error", f"{type(error).__name__}: {error}"[:500])


def grader_of(grade: config.Grade) -> Grader:
    """The one grader of this process for these settings. A worker so starts its children once, and not once per shard."""
    return _shared(grade.verifier, grade.answer_pattern, grade.deadline_s, grade.processes)


@lru_cache(maxsize=8)
def _shared(verifier: str, answer_pattern: str | None, deadline_s: float, processes: int) -> Grader:
    return Grader(verifier, answer_pattern, deadline_s, processes)


def judge(answer: str, reference: str, deadline_s: float) -> str:
    """'correct', 'wrong' or 'unparsable' by math-verify. It runs in a child process, and the caller enforces the deadline.

    A CPU limit ends the child even when its caller was killed. Raises what math-verify raises, and ValueError when the reference
    is not mathematics.
    """
    from math_verify import parse, verify

    used = resource.getrusage(resource.RUSAGE_SELF)
    budget = int(used.ru_utime + used.ru_stime + deadline_s + _CPU_GRACE_S)
    resource.setrlimit(resource.RLIMIT_CPU, (budget, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    # parsing_timeout=None: math-verify's timeout is an alarm signal, which C code can ignore. The caller kills the child instead.
    gold = parse(_as_latex(reference), parsing_timeout=None)
    if all(isinstance(form, str) for form in gold):  # parse gives back the text that it cannot read
        raise ValueError("the reference answer is not mathematics: set grade.verifier=exact")
    forms = parse(_as_latex(answer), parsing_timeout=None)
    if all(isinstance(form, str) for form in forms):
        return "unparsable"
    return "correct" if verify(gold, forms, timeout_seconds=None, raise_on_error=True) else "wrong"


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
    """A pool whose children fork from a server that has math-verify loaded. A killed child is so replaced in milliseconds."""
    context: Any = multiprocessing.get_context("forkserver")  # a plain fork would copy held locks of Ray and torch
    context.set_forkserver_preload(["math_verify"])
    return ProcessPool(max_workers=processes, initializer=_prepare_child, context=context)


def _prepare_child() -> None:
    import math_verify  # noqa: F401 - before the first deadline starts to run

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
