"""Watch over the cluster of a verb: a thread hears what Ray does not tell, and the verb ends with the reason.

Ray waits for a service that is stopped without end. When a service dies, Ray ends its driver by `_exit`, without a word. The
thread hears the death of a process at once, since it waits for it. Otherwise it asks Ray's GCS, the cluster's registry.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import exceptions
from ray._raylet import GcsClient  # type: ignore[attr-defined]

from pipeline.errors import ClusterError, first_line
from pipeline.store.private import temporary_folder

WORD_S, GIVE_UP_S, HURRY_S = 30.0, 120.0, 5.0
ASK_S, LOOK_S = 5.0, 2.0
_PARTS = ("gcs_server", "raylet")  # without one of them a driver cannot go on
_FULL_BYTES = 1 << 20
_MOST_READ = 1 << 20  # bytes of a log at a time
_FOR_MEMORY = re.compile(rb"\(raylet\).*?(\d+) Workers \(tasks / actors\) killed due to memory pressure.*?IP: ([\w.:]+)")

log = logging.getLogger(__name__)


@contextlib.contextmanager
def watching(
    say: Callable[[str], None], end: Callable[[ClusterError], None], is_hurried: Callable[[], bool], log_path: Path | None = None
) -> Iterator[None]:
    """Watch the cluster that this process has joined, for the length of a block.

    `say` also hears of processes that Ray ended for memory, when Ray writes so to the log at `log_path`. After WORD_S seconds
    without an answer `say` gets a line. After GIVE_UP_S seconds `end` gets the reason, after HURRY_S when somebody waits for the
    end already (`is_hurried`). When a part of Ray dies on this machine, `end` gets it at once.
    """
    stop = threading.Event()
    watch = Watch(own_parts(), _asking(), say, end, is_hurried, Overheard(log_path) if log_path else None)
    thread = threading.Thread(target=watch.run, args=(stop,), name="egrsd-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(ASK_S)


class Watch:
    """The state of the thread: for how long nobody has answered. Only time in which it looked counts: a suspension does not."""

    def __init__(
        self,
        parts: dict[str, subprocess.Popen[bytes]],
        ask: Callable[[], str | None],
        say: Callable[[str], None],
        end: Callable[[ClusterError], None],
        is_hurried: Callable[[], bool],
        overheard: Overheard | None = None,
    ) -> None:
        self._parts, self._ask, self._overheard = parts, ask, overheard
        self._say, self._end, self._is_hurried = say, end, is_hurried
        self._silent_s, self._told = 0.0, False

    def run(self, stop: threading.Event) -> None:
        """Look until `stop` is set or the cluster is lost."""
        while not stop.is_set():
            begun = time.monotonic()
            lost = self._dead() or self._quiet(self._stopped() or self._ask(), begun)
            if stop.is_set():
                return
            if self._overheard is not None and (text := self._overheard.word()) is not None:
                self._say(text)
            if lost is not None:
                self._end(ClusterError(f"lost the cluster: {lost}"))
                return
            self._rest(LOOK_S)

    def _dead(self) -> str | None:
        """The part of Ray that has ended, in words."""
        for name, process in self._parts.items():
            if (code := process.poll()) is not None:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"has ended (exit code {code})"
                return f"{name} of the Ray on this machine (process {process.pid}) {how}"
        return None

    def _stopped(self) -> str | None:
        """The part of Ray that is stopped, in words."""
        for name, process in self._parts.items():
            if _is_stopped(process.pid):
                return f"{name} of the Ray on this machine (process {process.pid}) is stopped"
        return None

    def _quiet(self, why: str | None, begun: float) -> str | None:
        """Count the seconds without an answer. Says a word after some of them, and returns the reason to end after more."""
        if why is None:
            if self._told:
                self._say("the cluster answers again.")
            self._silent_s, self._told = 0.0, False
            return None
        self._silent_s += min(time.monotonic() - begun, ASK_S) + LOOK_S
        limit = HURRY_S if self._is_hurried() else GIVE_UP_S
        if self._silent_s >= limit:
            return f"{why}, for {self._silent_s:.0f} s"
        if self._silent_s >= WORD_S and not self._told:
            self._told = True
            self._say(f"waiting for the cluster: {why}. The command ends after {GIVE_UP_S:.0f} s without an answer.")
        return None

    def _rest(self, seconds: float) -> None:
        """Sleep, but no longer than all parts live."""
        with contextlib.ExitStack() as stack:
            poll = select.poll()
            for process in self._parts.values():
                try:
                    handle = os.pidfd_open(process.pid)
                except OSError:
                    continue  # it has just ended, or the kernel is old
                stack.callback(os.close, handle)
                poll.register(handle, select.POLLIN)
            poll.poll(seconds * 1000)


class Overheard:
    """The log of a verb, where Ray says what it tells nobody: that it ended processes because memory ran out on a node."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, path.stat().st_size
        self._told: set[str] = set()

    def word(self) -> str | None:
        """A line about the nodes that the log names since the last question, each once. None when it names no new one."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._read)
                new = file.read(_MOST_READ)
        except OSError:  # the run's folder has gone, which ends the command with words of its own
            return None
        lines = new if len(new) == _MOST_READ else new[: new.rfind(b"\n") + 1]
        self._read += len(lines)
        found = {node.decode(): int(count) for count, node in _FOR_MEMORY.findall(lines)}
        places = [f"{count} on node {node}" for node, count in found.items() if node not in self._told]
        self._told |= set(found)
        if not places:
            return None
        remedy = "Free memory there, or ask for fewer engines (engines.rollout.max)"
        return f"memory ran out, and Ray ended processes: {', '.join(places)}. The run replaces its own. {remedy}."


def own_parts() -> dict[str, subprocess.Popen[bytes]]:
    """The processes of the Ray that this process has started, by name. Empty when it has joined a cluster."""
    node = ray._private.worker._global_node
    started: dict[str, Any] = node.all_processes if node is not None and node.is_head() else {}
    return {name: started[name][0].process for name in _PARTS if name in started}


def session_folder() -> str | None:
    """The temporary folder of the Ray that this process has started."""
    node = ray._private.worker._global_node
    return node.get_session_dir_path() if node is not None and node.is_head() else None


def _asking() -> Callable[[], str | None]:
    """A question to the cluster: whether it answers, and whether it still knows this driver's node. None when all is well."""
    context = ray.get_runtime_context()
    address, node = context.gcs_address, ray.NodeID.from_hex(context.get_node_id())  # Ray crashes on bytes
    client = GcsClient(address=address)

    def ask() -> str | None:
        """Why the cluster counts as silent at this moment."""
        try:
            (alive,) = client.check_alive([node], timeout=ASK_S)
        except Exception as error:  # Ray has no class for all of them
            return f"the head at {address} does not answer ({first_line(error)[:80]})"
        return None if alive else f"the head at {address} counts this driver's node as dead"

    return ask


def leave() -> None:
    """Leave the cluster. A Ray of our own that is stopped is ended by force, since its orderly end would wait for it."""
    parts = own_parts()
    if any(_is_stopped(process.pid) for process in parts.values()):
        for process in parts.values():
            process.kill()
    ray.shutdown()


def _is_stopped(pid: int) -> bool:
    """Whether a process lives and is stopped, by a signal or by a debugger."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False


def explain(error: BaseException) -> ClusterError | None:
    """An error of Ray or of the operating system that is no bug of this project, in words. None for any other."""
    cause = error.cause if isinstance(error, exceptions.RayTaskError) and isinstance(error.cause, Exception) else error
    if isinstance(cause, exceptions.OutOfMemoryError):
        return ClusterError(
            f"memory ran out, and Ray ended a process of the run ({first_line(cause)[:200]})",
            "",
            "Ask for fewer engines (engines.rollout.max) or shards at a time (engines.inflight_shards)",
        )
    if isinstance(cause, exceptions.OutOfDiskError) or (isinstance(cause, OSError) and cause.errno == errno.ENOSPC):
        return full_folder() or ClusterError(f"no space left ({first_line(cause)[:200]})", "", "Free some space")
    if isinstance(cause, exceptions.RayActorError) and cause.actor_init_failed:
        last = str(cause).strip().splitlines()[-1]
        return ClusterError(f"an actor could not start ({last.strip()[:200]})", "", "Run again with --debug")
    if isinstance(cause, _LOST):
        return full_folder() or ClusterError(f"lost a part of the cluster ({type(cause).__name__}: {first_line(cause)[:200]})")
    return None


_LOST = (
    exceptions.RaySystemError,
    exceptions.LocalRayletDiedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.RayActorError,
    exceptions.RpcError,
    exceptions.WorkerCrashedError,
)


def full_folder() -> ClusterError | None:
    """The folder on this machine whose lack of space explains a failure of Ray, as an error."""
    for folder in (temporary_folder("RAY_TMPDIR")[1], "/dev/shm"):
        with contextlib.suppress(OSError):
            if shutil.disk_usage(folder).free < _FULL_BYTES or not _free_files(folder):
                return ClusterError("no space left", folder, "Free some space there, or set TMPDIR to another folder")
    return None


def _free_files(folder: str) -> bool:
    """Whether a folder takes one more file. Some file systems count no files."""
    counts = os.statvfs(folder)
    return counts.f_files == 0 or counts.f_favail > 0
