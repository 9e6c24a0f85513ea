"""Waiting that polls: a test goes on once its condition holds, and a wait in vain says what it was for."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# Ray gives its workers ports below these, the kernel gives anybody ports above: a server that is still starting keeps its own.
_PORTS = iter(random.SystemRandom().sample(range(20_000, 32_000), 12_000))


def until(condition: Callable[[], T], within: float = 60, what: str = "the condition of a test", every: float = 0.05) -> T:
    """What `condition` returns once that is true. `within` and `every` are seconds. Raises AssertionError with `what`."""
    deadline = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {within:g} s in vain for: {what}"
        time.sleep(every)
    return found


def free_port() -> int:
    """A TCP port of loopback on which nothing listens. No port is given twice in one process."""
    for port in _PORTS:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("no port of loopback is free")
