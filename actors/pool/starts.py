"""Engines of a pool that could not be started: when the pool gives up, and when it only asks for no more for a while."""

from __future__ import annotations

from dataclasses import dataclass

PAUSE_S, LONGEST_PAUSE_S = 30.0, 1800.0


@dataclass
class Starts:
    """Tries to start engines that failed, since the last one that succeeded.

    Engines that were asked for before the last failure belong to its try: a node without room fails all of its engines at once.
    A pool that has the engines it needs goes on without more, and pauses for longer each time. Times are those of the caller.
    """

    failed: int = 0  # tries that failed while the pool lacked engines
    why: str = ""  # why the pool pauses
    _pauses: int = 0
    _until: float = 0.0
    _last: float = 0.0

    def fail(self, asked_at: float, enough: bool, why: str, now: float) -> None:
        """Note that an engine failed that was asked for at `asked_at`. enough: whether the pool has the engines it needs."""
        if asked_at < self._last:
            return
        self._last = now
        if not enough:
            self.failed += 1
            return
        self.why, self._until = why, now + min(PAUSE_S * 2**self._pauses, LONGEST_PAUSE_S)
        self._pauses += 1

    def succeed(self) -> None:
        """Note that an engine has started."""
        self.failed, self.why, self._pauses, self._until = 0, "", 0, 0.0

    def most(self, target: int, needed: int, now: float) -> int:
        """Engines that the pool may have now, of the `target` that it aims at. In a pause it starts those that it needs."""
        return target if now >= self._until else min(target, needed)
