"""Waits that poll: a test continues as soon as its condition holds, and fails with the name of the condition after a timeout."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar

import psutil
import pytest

if TYPE_CHECKING:
    from pipeline.live import lease
    from pipeline.store.directory import Store

T = TypeVar("T")
# Ray gives its workers ports below this range, and the kernel gives programs ports above it. No other program takes a port here
# between `free_port` and the start of the server, and no other process of pytest-xdist: each of eight has a part of its own.
_PART = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0) % 8
_PORTS = iter(random.SystemRandom().sample(range(20_000 + 1_500 * _PART, 21_500 + 1_500 * _PART), 1_500))


def until(condition: Callable[[], T], within: float = 300, what: str = "the condition of a test", every: float = 0.05) -> T:
    """The first true value that `condition` returns. Waits for `within` seconds, and polls `every` so many seconds.

    A poll costs a second at most: on a full machine a process may stand still for a minute, and has not waited then.

    Raises AssertionError with `what` after the timeout.
    """
    left, before = within, time.monotonic()
    while not (found := condition()):
        assert left > 0, f"waited {within:g} s in vain for: {what}"
        time.sleep(every)
        left, before = left - min((now := time.monotonic()) - before, 1), now
    return found


def race(store: Store, drivers: int) -> tuple[int, int]:
    """How many drivers of threads hold a run, and how many are refused, when all find it free and then all write their leases.

    The clock stands still for them: a write that a full machine holds up would make its driver wait five times as long.
    """
    from pipeline.errors import UserError
    from pipeline.live import lease

    held, refused, gate, write = [], [], threading.Barrier(drivers), lease._write

    def at_once(store: Store, mine: lease.Lease, beats: int) -> None:
        first = gate.wait if not beats else lambda: 0  # a holder's later beats wait for nobody
        first()
        write(store, mine, beats)
        first()

    def driver() -> None:
        try:
            with lease.held(store):
                held.append(1)
                until(lambda: len(refused) == drivers - 1, what="all others are refused")
        except UserError:
            refused.append(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "_write", at_once)
        patch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=time.sleep))
        threads = [threading.Thread(target=driver) for _ in range(drivers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return len(held), len(refused)


def free_port() -> int:
    """A TCP port of the loopback address on which nothing listens. One process gets no port twice."""
    for port in _PORTS:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("no port of loopback is free")


def below(word: str) -> list[psutil.Process]:
    """The processes below this one whose title has `word`. Those that end meanwhile are passed over."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if word in " ".join(process.cmdline()[:1]):
                found.append(process)
    return found
