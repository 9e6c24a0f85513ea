"""The card that an engine and the trainer share: the process that uses it holds a lock of the operating system.

The driver lets the two take turns. The lock keeps the promise when a process is killed, stopped or replaced in between: the
system frees it when its holder's process has ended, and not before. Then the memory of that process is free too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from uuid import uuid4

from pipeline.store.private import private_folder

_POLL_S = 0.05


@cache
def name_here() -> str:
    """The name of the card that engine and trainer of this driver's run share. The driver hands it to both."""
    return f"card-{os.getpid()}-{uuid4().hex[:8]}"


class Card:
    """A lock that one process of this machine and user holds at a time. `name` tells it from the locks of other runs."""

    def __init__(self, name: str) -> None:
        self._path = private_folder("cards") / name
        self._file: int | None = None

    def take(self, within_s: float = float("inf"), stopped: Callable[[], bool] = lambda: False, poll_s: float = _POLL_S) -> bool:
        """Wait for the lock, and hold it. False after `within_s` seconds, or when `stopped` says so. A holder keeps it."""
        deadline = time.monotonic() + within_s
        while not self._try():
            if stopped() or time.monotonic() >= deadline:
                return False
            time.sleep(poll_s)
        return True

    def release(self) -> None:
        """Give the lock up. Nothing happens without it."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)  # whoever waits for this file sees that it is gone, and makes another
            os.close(self._file)
            self._file = None

    @contextlib.contextmanager
    def held(self, stopped: Callable[[], bool] = lambda: False, poll_s: float = _POLL_S) -> Iterator[bool]:
        """Hold the lock for the length of a block. The block gets False, without the lock, when `stopped` says so."""
        mine = self.take(stopped=stopped, poll_s=poll_s)
        try:
            yield mine
        finally:
            self.release()

    def holder(self) -> str:
        """The process id of the holder, or "" when nobody holds it or it cannot be read."""
        try:
            return self._path.read_text()
        except OSError:
            return ""

    def _try(self) -> bool:
        if self._file is not None:
            return True
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.stat(self._path), os.fstat(file)):
                raise FileNotFoundError  # its last holder removed it
        except (BlockingIOError, FileNotFoundError):
            os.close(file)
            return False
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        self._file = file
        return True
