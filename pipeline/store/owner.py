"""Which process made an unfinished file, and whether it has ended: its machine, its process id and the time of its start."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from functools import cache
from pathlib import Path

import psutil

from pipeline.digest import short

OLD_S = 86_400.0  # an unfinished file of another machine, or of an unknown writer, is swept when it is this old
_MARK = re.compile(r"(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,9})-(?P<start>\d{1,20})-")


def host() -> str:
    """A name for this machine, this boot and this space of process ids, since containers may share a host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def mark() -> str:
    """The beginning of the name of every unfinished file of this process."""
    return _mark(os.getpid())


def is_left(path: Path) -> bool:
    """Whether an unfinished file or folder is left over: its process has ended, or nobody can tell and it is old."""
    owner = _MARK.match(path.name)
    if owner is not None and owner["host"] == _short_host():
        return _start(int(owner["pid"])) != int(owner["start"])
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > OLD_S
    return False


@cache
def _mark(pid: int) -> str:
    return f"{_short_host()}-{pid}-{_start(pid)}-"


@cache
def _short_host() -> str:
    return short(host().encode(), 8)


def _start(pid: int) -> int:
    """A number that no later process with the same id has: when the process began. 0 for one that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if state in "ZX" else int(fields[18])
    except OSError:  # ended, or a system without /proc
        return int(psutil.pid_exists(pid))
