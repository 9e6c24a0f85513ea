"""Child processes that answer one question at a time, and that may be killed at any moment.

A question may use a number of *processor* seconds; the kernel's profiling timer ends a child that uses more. So a loaded machine
changes no result. A child whose processor time stands still for `stall_s` seconds, as a stopped process does, is replaced. So is
the server that starts the children and tells how they ended. Where a question may wait for something else than the processor,
`deadline_s` limits it by the clock.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, spawn
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

STALL_S = 60.0  # a child that runs gets some processor time in every minute, also on a very busy machine
OVERRAN, LATE, NEVER = "overran", "late", "could not be started"  # three `ended` of Outcome
_LOOK_S = 1.0  # seconds between two looks at the processor time of the children
_UNKNOWN = 255  # the exit code that multiprocessing gives when the server died before it told one
_STARTS = 2  # tries to start a child, each with a server of its own
_NAME = "egrsd-child"  # of the processes


@dataclass(frozen=True)
class Outcome:
    """What became of one question.

    reply: what the child sent last, None when it sent nothing. notes: what it sent before.
    ended: "" when the child answered, OVERRAN when it used up its processor seconds, LATE when its deadline passed. These are of
    one try. Else what happened twice: "stalled" when the processor time of the child or its server stood still, or how its
    process died. It is NEVER when no process could be had.
    """

    reply: Any = None
    notes: tuple[Any, ...] = ()
    ended: str = ""


@dataclass
class _Clock:
    """When the processor time of a process was last seen to move."""

    cpu_s: float = -1.0
    seen: float = field(default_factory=time.monotonic)

    def stands_still(self, pid: int, stall_s: float) -> bool:
        """Whether the processor time of process `pid` has stood still for `stall_s` seconds."""
        cpu_s, now = _cpu_s(pid), time.monotonic()
        if cpu_s != self.cpu_s:
            self.cpu_s, self.seen = cpu_s, now
        return now - self.seen > stall_s


@dataclass
class _Child:
    """One process, our end of its pipe, and the question that it works on."""

    process: Any
    pipe: Connection
    handle: psutil.Process  # it can end the process also when the server is dead
    question: int | None = None
    given: float = 0.0  # time.monotonic() when it got the question, or sent its last note
    notes: list[Any] = field(default_factory=list)
    clock: _Clock = field(default_factory=_Clock)


class Children:
    """Up to `number` processes that run `work`. They start when they are needed, and live until `close`."""

    def __init__(
        self,
        work: Callable[[Connection], None],
        number: int,
        preload: Sequence[str] = (),
        stall_s: float = STALL_S,
        deadline_s: float = math.inf,
    ) -> None:
        """Children that start later.

        work: the loop of a child: it reads questions from its pipe, and ends each with `done`.
        preload: modules to import.
        deadline_s: seconds by the clock that a child may be silent on a question, once it has sent its first note.
        """
        self._work, self._number, self._stall_s, self._deadline_s = work, number, stall_s, deadline_s
        self._idle: list[_Child] = []
        self._busy: list[_Child] = []
        # a child forks from a server that has the modules loaded: a plain fork would copy held locks of Ray and torch
        self._context: Any = multiprocessing.get_context("forkserver")
        # No module of ours: the server of Python 3.11 looks into the current folder first, where a rival may lie.
        if preload:  # the server is shared, and the last list counts
            self._context.set_forkserver_preload(list(preload))

    def close(self) -> None:
        """End all processes, also the busy and the stopped ones."""
        while self._idle or self._busy:
            self._kill((self._idle or self._busy).pop())

    def abandon(self) -> None:
        """Kill all processes, and wait for none. For the end of this process: from Python 3.12 on no thread may start there."""
        for child in (*self._idle, *self._busy):
            with contextlib.suppress(psutil.Error):
                child.handle.kill()

    def ask(self, questions: Sequence[Any]) -> list[Outcome]:
        """The outcome of every question, in order. No question waits behind one that hangs while another child is free.

        A question whose child died or stood still is asked a second time, after all others: the child may have died before it
        read the question, and a server that died tells no exit code.
        """
        outcomes = self._outcomes(questions)
        again = [i for i, outcome in enumerate(outcomes) if outcome.ended not in ("", OVERRAN, LATE)]
        for i, outcome in zip(again, self._outcomes([questions[i] for i in again]), strict=True):
            outcomes[i] = outcome
        return outcomes

    def _outcomes(self, questions: Sequence[Any]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        waiting = list(range(len(questions) - 1, -1, -1))
        try:
            while len(outcomes) < len(questions):
                while waiting and len(self._busy) < self._number and self._give(waiting[-1], questions):
                    waiting.pop()
                if not self._busy:  # no child starts
                    outcomes |= {number: Outcome(ended=NEVER) for number in waiting}
                    break
                ready = set(wait([child.pipe for child in self._busy], min(_LOOK_S, self._deadline_s)))
                for child in list(self._busy):
                    outcome = self._hear(child) if child.pipe in ready else self._look(child)
                    if outcome is not None and child.question is not None:
                        outcomes[child.question] = outcome
                        self._busy.remove(child)
                        self._retire(child, outcome)
        except BaseException:
            self.close()  # a question that was given up must not be answered into the next call
            raise
        return [outcomes[i] for i in range(len(questions))]

    def _give(self, number: int, questions: Sequence[Any]) -> bool:
        """Hand a question to an idle child that still lives, or to a new one. False when no child starts."""
        while (child := self._idle.pop() if self._idle else self._start()) is not None:
            child.question, child.notes, child.clock, child.given = number, [], _Clock(), time.monotonic()
            try:
                child.pipe.send(questions[number])
            except OSError:  # it died while it was idle
                self._kill(child)
                continue
            self._busy.append(child)
            return True
        return False

    def _start(self) -> _Child | None:
        """A new child. None when two servers in a row stood still, or died."""
        for _ in range(_STARTS):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_begin, args=(self._work, theirs), name=_NAME, daemon=True)
            try:
                with theirs, _watched_server(self._stall_s):
                    process.start()
                return _Child(process, ours, psutil.Process(process.pid))
            except (EOFError, OSError, psutil.Error):
                ours.close()
        return None

    def _hear(self, child: _Child) -> Outcome | None:
        """The outcome when the child has answered or died, else None."""
        try:
            final, value = child.pipe.recv()
        except (EOFError, OSError):
            with _watched_server(self._stall_s):
                child.process.join()
            code = child.process.exitcode
            known = {-signal.SIGPROF: OVERRAN, _UNKNOWN: "stalled"}
            ended = known.get(code, f"died with exit code {code}")
            return Outcome(None, tuple(child.notes), ended)
        if final:
            return Outcome(value, tuple(child.notes))
        child.notes.append(value)
        child.given = time.monotonic()
        return None

    def _look(self, child: _Child) -> Outcome | None:
        # a child that starts, imports its modules first: its deadline begins with its first note
        if time.monotonic() - child.given > (self._deadline_s if child.notes else max(self._deadline_s, STALL_S)):
            return Outcome(None, tuple(child.notes), LATE)
        stalled = child.clock.stands_still(child.process.pid, self._stall_s)
        return Outcome(None, tuple(child.notes), "stalled") if stalled else None

    def _retire(self, child: _Child, outcome: Outcome) -> None:
        if outcome.ended:
            self._kill(child)
        else:
            child.question = None
            self._idle.append(child)

    def _kill(self, child: _Child) -> None:
        child.pipe.close()
        with contextlib.suppress(psutil.Error):
            child.handle.kill()
        with _watched_server(self._stall_s):
            child.process.join()


_told = spawn.get_preparation_data


def _tell(name: str) -> dict[str, Any]:
    """What multiprocessing tells a new process. Children do not hear of the main script, and so do not run it.

    A script without `if __name__ == "__main__"` would start its own work again. A worker of Ray would import Ray, for .6 s.
    """
    told = _told(name)
    return {key: value for key, value in told.items() if name != _NAME or not key.startswith("init_main")}


spawn.get_preparation_data = _tell


def _begin(work: Callable[[Connection], None], pipe: Connection) -> None:
    """What a child does. Ctrl-C in a terminal reaches it too, but the command alone answers: the child ends with its pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    work(pipe)


def allow(processor_s: float) -> None:
    """For a child: end this process after so many more processor seconds. 0: never. It works in C code, and without a parent."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, processor_s)


def done(pipe: Connection, value: Any) -> None:
    """For a child: the answer to its question."""
    pipe.send((True, value))


def note(pipe: Connection, value: Any) -> None:
    """For a child: something that the parent knows even when this question kills the child."""
    pipe.send((False, value))


def _cpu_s(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return -1.0
    return float(times.user + times.system)


@contextlib.contextmanager
def _watched_server(stall_s: float) -> Iterator[None]:
    """Kill the server of the children when its processor time stands still for `stall_s` seconds while the block waits for it.

    Whoever waits for a dead server gets an EOFError, an OSError or the exit code 255, and the next start makes a new server.
    """
    ended = threading.Event()
    watch = threading.Thread(target=_watch_server, args=(ended, stall_s), daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch_server(ended: threading.Event, stall_s: float) -> None:
    clock = _Clock()
    while not ended.wait(min(_LOOK_S, stall_s)):
        pid = getattr(forkserver._forkserver, "_forkserver_pid", None)  # type: ignore[attr-defined]  # no public name has it
        if pid is not None and clock.stands_still(pid, stall_s):
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # multiprocessing itself reaps it
