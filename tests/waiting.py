"""Waits that poll: a test continues as soon as its condition holds, and fails with the name of the condition after a timeout."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")
# Ray gives its workers ports below this range, and the kernel gives programs ports above it. No other program takes a port here
# between `free_port` and the start of the server.
_PORTS = iter(random.SystemRandom().sample(range(20_000, 32_000), 12_000))


def until(condition: Callable[[], T], within: float = 60, what: str = "the condition of a test", every: float = 0.05) -> T:
    """The first true value that `condition` returns. Waits for `within` seconds, and polls `every` so many seconds.

    Raises AssertionError with `what` after the timeout.
    """
    deadline = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {within:g} s in vain for: {what}"
        time.sleep(every)
    return found


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
