"""A thread of the driver that watches a pool: it tells who is waited for, and replaces a dispatcher that has stopped.

The dispatcher replaces engines that have stopped. Nobody but the driver can see that the dispatcher has.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError, RayError

from actors.pool.member import STALLED, EngineStatus, PoolStatus
from actors.pool.probe import STRANGE
from pipeline import config
from pipeline.errors import first_line
from pipeline.notices import NOTICE_S, Sparing, tell
from pipeline.stages.score import bounds_instead

log = logging.getLogger(__name__)

_LOOK_S = 2.0


class Watch:
    """Watches the dispatcher of a pool from its construction until `end`."""

    def __init__(self, dispatcher: Any, settings: config.Pool, setting: str) -> None:
        self._dispatcher, self._settings, self._setting = dispatcher, settings, setting
        self._ended, self._notices = threading.Event(), Sparing()
        self.turn = threading.Lock()  # held while the pool is told whose turn a shared card is
        self.awake = False  # whether it is the engines'
        threading.Thread(target=self._run, name=f"egrsd-{setting}", daemon=True).start()

    def end(self) -> None:
        """Stop to watch. The thread ends within a second or two, and its caller does not wait for it."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(_LOOK_S) and ray.is_initialized():
            try:
                status = self._look()
            except RayActorError:
                return  # Ray does not restart it: the pool is gone, and its callers hear of it
            except RayError as error:
                log.warning("The pool of %s cannot be looked at: %s", self._setting, first_line(error))
                continue
            if status is not None and status.asleep:
                self._wake()
            for notice in words(status, self._settings, self._setting) if status is not None else ():
                self._notices.tell(*notice)

    def _look(self) -> PoolStatus | None:
        """The state of the pool, or None when the dispatcher had to be replaced. Seconds count while this process runs."""
        asked, silent = self._dispatcher.overview.remote(), 0.0
        part = min(1.0, self._settings.stall_timeout_s / 4)
        while not ray.wait([asked], timeout=part)[0]:
            if self._ended.is_set():
                return None
            silent += part
            if silent >= NOTICE_S:
                self._notices.tell(f"{self._setting} dispatcher silent", self._dispatcher_words(f"for {silent:.0f} s"))
            if silent >= self._settings.stall_timeout_s:
                tell(f"{self._setting} dispatcher replaced", f"{self._setting}: the stopped dispatcher is replaced")
                ray.kill(self._dispatcher, no_restart=False)
                return None
        status: PoolStatus = ray.get(asked)
        return status

    def _wake(self) -> None:
        """Tell a dispatcher that was restarted in the engines' turn on a shared card that it is their turn."""
        if self.turn.acquire(blocking=False):  # else the driver is just telling it
            try:
                if self.awake:
                    self._dispatcher.wake.remote()
            finally:
                self.turn.release()

    def _dispatcher_words(self, since: str) -> str:
        after = f"It is replaced after {self._settings.stall_timeout_s:g} s"
        return f"{self._setting}: no sign of life from the dispatcher {since}. {after}."


class Notice(NamedTuple):
    """What `notices.Sparing` tells: a text of a kind about an engine, or about the pool ("")."""

    kind: str
    text: str
    about: str = ""


def words(status: PoolStatus, settings: config.Pool, setting: str) -> Iterator[Notice]:
    """A notice for every engine that has been silent for NOTICE_S seconds, and for those that were replaced for it.

    Engines that give bounds where exact entropies were asked for are told too, and those that a pool must do without.
    """
    if status.fallback:
        yield Notice(f"{setting} bounds", f"warning: {setting}: {bounds_instead(status.fallback)}")
    if status.cannot_grow:
        text = f"one more engine does not start. The pool goes on without it, and tries again later ({status.cannot_grow})."
        yield Notice(f"{setting} cannot grow", f"warning: {setting}: {text}")
    serves = any(engine.state == "serving" for engine in status.engines)
    for engine in status.engines:
        told = _words(engine, serves, settings)
        if told is not None:
            yield Notice(f"{setting} {told[0]}", f"{setting}: {told[1]}", engine.name)
    for name, cause, _ in status.gone:
        if cause.startswith((STALLED, STRANGE)):
            text = f"engine {name} {cause} and is replaced. Its unfinished batches are asked again."
            yield Notice(f"{setting} replaced", f"{setting}: {text}", name)


def _words(engine: EngineStatus, serves: bool, settings: config.Pool) -> tuple[str, str] | None:
    """(kind, text) for an engine that is waited for, or None."""
    if engine.silent_s >= NOTICE_S:
        after = f"It is replaced after {settings.stall_timeout_s:g} s"
        return "silent", f"no sign of life from engine {engine.name} for {engine.silent_s:.0f} s. {after}."
    if engine.state == "loading" and not serves and engine.seconds >= NOTICE_S:
        if engine.pid:
            return "loading", f"engine {engine.name} has been loading for {engine.seconds:.0f} s. A first start may compile."
        return "unplaced", f"engine {engine.name} has waited {engine.seconds:.0f} s for a place in the cluster."
    if engine.state != "loading" and engine.step_s >= NOTICE_S:
        after = f"It is replaced after {settings.start_timeout_s:g} s"
        return "step", f"engine {engine.name} has been at one step for {engine.step_s:.0f} s. A first step may compile. {after}."
    return None
