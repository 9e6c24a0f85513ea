"""The callers of a dispatcher that wait: for any change of the pool, or in line for room at an engine."""

from __future__ import annotations

import asyncio
from collections import deque

from pipeline.errors import EgrsdError


class Callers:
    """Everybody who waits for a pool. `failure` is the error that ended the pool: who waits then, or later, gets it."""

    def __init__(self, failure: EgrsdError | None) -> None:
        self.failure = failure
        self._changed = asyncio.Event()
        self._line: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        """Callers in line."""
        return len(self._line)

    async def change(self, in_line: bool = False) -> None:
        """Wait for a change of the pool, or with `in_line` for this caller's turn. Raises the error that ended the pool."""
        if self.failure is not None:
            raise self.failure
        if in_line:
            self._line.append(turn := asyncio.get_running_loop().create_future())
            await turn
        else:
            await self._changed.wait()
        if self.failure is not None:
            raise self.failure

    def notify(self, room: int | None = None) -> None:
        """Wake the waiting callers. Of those in line only `room` are woken; None wakes them all.

        At a thousand engines, waking every caller at the end of every batch let through only ten batches a second.
        """
        self._changed.set()
        self._changed = asyncio.Event()
        left = len(self._line) if room is None else room
        while left > 0 and self._line:
            turn = self._line.popleft()
            if not turn.done():  # a caller that was cancelled takes nobody's turn
                turn.set_result(None)
                left -= 1

    def fail(self, error: EgrsdError) -> None:
        """End the pool with an error, unless it has ended already. Every waiting and later call raises the first error."""
        self.failure = self.failure or error
        self.notify()
