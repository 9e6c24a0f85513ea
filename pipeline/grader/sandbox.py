"""Runs programs that nobody trusts in a process that `grader/lockdown.py` locks down, and reads its report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.grader import lockdown

_ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the same program gives the same answer
    "PYTHONIOENCODING": "utf-8",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
_START_S = 60.0  # seconds that the process may take beside its programs


class SandboxError(Exception):
    """The locked-down process could not be started, or gave no report. It is no fault of the program."""


@dataclass(frozen=True)
class Program:
    """One program: Python source (`main`) that finds the model's answer in `answer.py` of its folder.

    secret: what file descriptor 3 holds. What the program writes to descriptor 4 comes back as `told`.
    """

    main: str
    answer: str
    stdin: str = ""
    secret: str = ""


@dataclass(frozen=True)
class Limits:
    """Limits of each program, and whether it runs at all without the three locks on network, files and processes.

    time_s: processor seconds. They do not depend on how busy the machine is.
    still_s: seconds by the clock after which a program that uses no processor is ended.
    namespaces, landlock, seccomp: whether the lock is tried; tests switch them off one by one.
    """

    time_s: float = 5.0
    memory_mb: int = 512
    scratch_mb: int = 16
    output_kb: int = 64
    still_s: float = 10.0
    required: bool = True
    namespaces: bool = True
    landlock: bool = True
    seccomp: bool = True

    def longest_s(self, programs: int) -> float:
        """Seconds by the clock after which the process with so many programs is ended."""
        return _START_S + programs * (lockdown.longest_s(self.time_s) + 1)


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it printed and told.

    ended: exit (with code 0), failed, output, time (at a limit of the kernel), or still (by the clock alone: `still_s` without
    processor time, or far more than `time_s`). The last may be the fault of a full machine, or of one that stood still.
    """

    ended: str
    stdout: str
    told: str


@dataclass(frozen=True)
class Report:
    """What holds (network, files, processes), by which means, and how each program ended. Without a required lock none runs."""

    locks: dict[str, bool]
    by: tuple[str, ...]
    runs: list[Ended]

    @property
    def missing(self) -> list[str]:
        """What is not locked."""
        return sorted(name for name, holds in self.locks.items() if not holds)


def run(programs: list[Program], limits: Limits) -> Report:
    """Run the programs one after the other in one locked-down process. Raises SandboxError when it gives no report."""
    scratch = tempfile.mkdtemp(prefix="egrsd-run-")
    plan = asdict(limits) | {
        "programs": [asdict(program) for program in programs],
        "scratch": scratch,
        "visible": visible(),
        "python": os.path.realpath(sys.executable),
        "environment": _ENVIRONMENT | _libraries(),
    }
    try:
        return _read(_asked(plan, limits.longest_s(len(programs))))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _asked(plan: dict[str, Any], seconds: float) -> bytes:
    command = [sys.executable, "-I", "-S", "-B", lockdown.__file__]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(plan).encode(),
            capture_output=True,
            timeout=seconds,
            env=_libraries(),
            start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxError(f"the locked-down process did not end: {error}"[:200]) from error
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise SandboxError(f"the locked-down process ended with code {done.returncode}: {''.join(last)}"[:300])
    return done.stdout


def _read(data: bytes) -> Report:
    try:
        document = json.loads(data)
        return Report(document["locks"], tuple(document["by"]), [Ended(**one) for one in document["runs"]])
    except (ValueError, KeyError, TypeError) as error:
        raise SandboxError(f"the locked-down process gave no report: {error}"[:200]) from error


@lru_cache(maxsize=1)
def visible() -> list[str]:
    """The files and folders that a program may read: the interpreter, its packages, and the libraries of the system."""
    paths = sysconfig.get_paths()
    wanted = [sys.base_prefix, os.path.realpath(sys.base_prefix), paths["stdlib"], *packages()]
    wanted += ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/lib", "/lib64", "/etc/ld.so.cache"]
    wanted += [path for path in _libraries().get("LD_LIBRARY_PATH", "").split(":") if os.path.isabs(path)]
    python = os.path.realpath(sys.executable)
    wanted.append(str(Path(python).parent.parent) if Path(python).parent.name == "bin" else python)
    there = sorted({path.rstrip("/") for path in wanted if os.path.exists(path) and path.rstrip("/")}, key=len)
    inside = lambda path, roots: any(path != root and path.startswith(f"{root}/") for root in roots)  # noqa: E731
    return [path for path in there if not inside(path, [root for root in there if not os.path.islink(root)])]


def _libraries() -> dict[str, str]:
    """The one variable of the environment that a program gets: some interpreters do not start without it."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def packages() -> list[str]:
    """Folders of installed packages, which a program may import."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(path for path in (paths["purelib"], paths["platlib"]) if os.path.isdir(path)))
