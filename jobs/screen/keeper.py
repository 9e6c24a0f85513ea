"""The keeper: a verb that uses Ray works in a child process, and this process waits for it, tells its end and tidies up.

Ray ends its driver without a word when it loses its cluster. The kernel may kill a driver, and a Ray that is stopped hinders the
driver's own end. So another process tells the end where the child cannot. It loads the project only when something must be freed.

The child says through a pipe what it holds, one JSON object a line (`tell`):

    {"holds": URI}, {"frees": URI}         It takes the lease of a folder, or gave it back.
    {"log": PATH, "at": PLACE}             Its log, and the log's place in the run.
    {"folder": PATH}                       A temporary folder of this command, to be removed.
    {"ray": PATH}, {"ray": null}           Its own Ray is about to make such a folder there, or has made it and it was told.
    {"joins": ADDRESS}                     It joins a cluster, or starts its own.
    {"told": CODE}                         It has told how it ended, and is ending with this exit code.
    {"printed": true}                      It has printed its JSON document.
    {"lost": LINE, "code": CODE}           It must be ended now, and this is why.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.screen import envelope
from pipeline.errors import LAST_WORD

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ORDERLY_S = 60.0  # an end that takes longer, after a signal or the last word, is cut off
LOOK_S = 0.1
FREE_S = 20.0  # for the lease of a store that may not answer
KILL_S = 10.0
_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36  # prctl(2): PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER

_pipe: int | None = None  # to the keeper, in its child
_writing = threading.Lock()


def keep(what: str = "") -> None:
    """Go on in a child process. This process waits for it, and exits with its code or with that of its end (README: exit codes).

    Call it while the process has one thread. `what` is told at once, since the work itself takes seconds to load.
    """
    global _pipe
    if what and not envelope.asked.get().json:
        with contextlib.suppress(OSError):
            os.write(1, f"egrsd {what}: begins\n".encode(errors="surrogateescape"))
    mine, theirs = os.pipe()
    keeper = os.getpid()
    _control(_ADOPT_ORPHANS, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    child = os.fork()
    if child:
        os.close(theirs)
        kept = Keeper(child, mine)
        _hear(kept.on_signal)
        sys.exit(kept.wait())
    os.close(mine)
    _control(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(1)
    _pipe = theirs
    _hear(lambda number, _: os._exit(128 + number))  # until a session listens, and after it


def is_kept() -> bool:
    """Whether this process works for a keeper."""
    return _pipe is not None


def main_pid() -> int:
    """The process that a person sees and may stop: the keeper, or this process when it has none."""
    return os.getppid() if is_kept() else os.getpid()


def tell(**facts: Any) -> None:
    """Say something to the keeper. Without one nothing happens."""
    if _pipe is not None:
        with _writing, contextlib.suppress(OSError):
            os.write(_pipe, json.dumps(facts).encode() + b"\n")


def leave(code: int) -> None:
    """End this process at once when it works for a keeper and has failed. Call it when all is told and given back.

    Threads that still work in Arrow or Ray may crash while Python takes itself down, and so print more than the last line.
    """
    if is_kept() and code:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def again() -> str:
    """How to go on after an end that was no mistake: the command as it was typed."""
    program = Path(sys.argv[0])
    words = ["python", "-m", "jobs"] if program.name == "__main__.py" else [program.name]
    return f"The same command goes on where this one stopped: {shlex.join([*words, *sys.argv[1:]])}"


class Keeper:
    """Waits for the child, and knows what it has said."""

    def __init__(self, child: int, pipe: int) -> None:
        self._child, self._pipe = child, pipe
        self._unread = b""
        self._status: int | None = None  # exit code, or minus the signal that ended the child
        self._signals: list[int] = []
        self._deadline = float("inf")
        self._told: int | None = None
        self._printed = False  # whether the child has printed its JSON document
        self._joins = False  # whether the child has begun to join a cluster, so that Ray may end it
        self._lost: tuple[str, int] | None = None
        self._log: tuple[str, str] | None = None
        self._held: list[str] = []
        self._folders: list[str] = []
        self._ray: str | None = None  # the folder in which a Ray that is starting makes its own
        self._kills = memory_kills()

    def wait(self) -> int:
        """Wait for the child's end, tell it where the child did not, end what it started, and return the exit code."""
        while not self._has_ended():
            self._listen(LOOK_S)
            if self._lost is not None or time.monotonic() > self._deadline:
                self._kill()
        while self._listen(0):
            pass
        code, line = self._end()
        if line is not None:
            self._say(line, code)
        end_descendants()
        freeing = threading.Thread(target=self._free, daemon=True)
        freeing.start()
        self._remove_folders()  # at the same time: a store that does not answer keeps no folder
        freeing.join(FREE_S)
        return code

    def on_signal(self, number: int, _: Any) -> None:
        """Pass the first signal on, which asks for an orderly end. A second one ends the child at once.

        A closed terminal may send SIGHUP twice, once from the kernel and once from the shell.
        """
        self._signals.append(number)
        if len(self._signals) > 1:
            if number != signal.SIGHUP:
                self._kill()
        else:
            self._deadline = time.monotonic() + ORDERLY_S
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, number)
            if os.isatty(2):
                os.write(2, b"\nending in order. Once more ends it at once.\n")

    def _kill(self) -> None:
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)

    def _has_ended(self) -> bool:
        """Collect the children that have ended, adopted ones too. Whether the child is among them."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._child:
                    self._status = os.waitstatus_to_exitcode(ended[1])
        return self._status is not None

    def _listen(self, patience_s: float) -> bool:
        """Hear what the child says within some seconds. Whether it said something."""
        if self._pipe < 0:
            time.sleep(patience_s)
            return False
        if not select.select([self._pipe], [], [], patience_s)[0]:
            return False
        if not (read := os.read(self._pipe, 1 << 16)):
            os.close(self._pipe)
            self._pipe = -1
            return False
        *lines, self._unread = (self._unread + read).split(b"\n")
        for line in lines:
            self._note(json.loads(line))
        return True

    def _note(self, said: dict[str, Any]) -> None:
        if "holds" in said:
            self._held.append(said["holds"])
        elif "frees" in said:
            self._held.remove(said["frees"])
        elif "log" in said:
            self._log = said["log"], said["at"]
        elif "folder" in said:
            self._folders.append(said["folder"])
        elif "ray" in said:
            self._ray = said["ray"]
        elif "joins" in said:
            self._joins = True
        elif "printed" in said:
            self._printed = True
        elif "told" in said:
            self._told = said["told"]
            self._deadline = min(self._deadline, time.monotonic() + ORDERLY_S)
        elif "lost" in said and self._told is None:
            self._lost = said["lost"], said["code"]

    def _end(self) -> tuple[int, str | None]:
        """The exit code, and the line that the child could not say."""
        assert self._status is not None
        if self._lost is not None:
            return self._lost[1], self._lost[0]
        asked = [128 + number for number in self._signals]
        if self._told is not None and (not asked or self._told in (0, *asked)):
            return self._told, None
        if self._signals:
            return asked[0], f"Interrupted ({signal.Signals(self._signals[0]).name}). {again()}"
        if self._status < 0:
            killed = memory_kills() > self._kills
            why = ", and the kernel's memory killer was at work: give it more memory, or ask for less" if killed else ""
            return 128 - self._status, f"the command was ended by {signal.Signals(-self._status).name}{why}. {again()}"
        if self._status == 1 and self._joins:
            return 1, f"lost the cluster: Ray ended the command, as it does when a part of it is gone. {again()}"
        return self._status, None

    def _say(self, line: str, code: int) -> None:
        """Write the last line to the terminal and to the log. Either may be gone."""
        from jobs.screen.terminal import printable

        text = f"error: {printable(' '.join(line.split()))}\n"
        cursor = "\x1b[?25h\n" if os.isatty(1) else ""  # a progress bar hides it
        log = f"log: {printable(self._log[1])}\n" if self._log is not None else ""
        with contextlib.suppress(OSError):
            os.write(1, cursor.encode())
            os.write(2, (text + log).encode(errors="backslashreplace"))
        if envelope.asked.get().json and not self._printed:
            told = envelope.Told(error=envelope.error_of("Ended", " ".join(line.split())), log=self._log and self._log[1])
            with contextlib.suppress(OSError):
                os.write(1, f"{envelope.document(told, code)}\n".encode())
        if self._log is not None:
            with contextlib.suppress(OSError), open(self._log[0], "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {LAST_WORD % (code, text.removeprefix('error: '))}")

    def _free(self) -> None:
        """Give the child's leases back."""
        if self._held:
            from jobs.opened import open_folder
            from pipeline.live.lease import free

            for uri in self._held:
                with contextlib.suppress(Exception):
                    free(open_folder(uri), os.getpid())

    def _remove_folders(self) -> None:
        """Remove the child's temporary folders, also that of a Ray which was still starting. Ray names it by the child's id."""
        begun = Path(self._ray).glob(f"session_*_{self._child}") if self._ray is not None else ()
        for folder in [*self._folders, *begun]:
            shutil.rmtree(folder, ignore_errors=True)
            latest = Path(folder).with_name("session_latest")  # Ray's link to the last of its folders
            if latest.is_symlink() and not latest.exists():
                latest.unlink(missing_ok=True)


def end_descendants() -> None:
    """End all that this process and its children have started. Python's resource trackers get a moment to free shared memory."""
    import psutil

    begun = time.monotonic()
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < begun + KILL_S:
        for process in left:
            with contextlib.suppress(psutil.Error):
                if time.monotonic() > begun + 2 or "resource_tracker" not in " ".join(process.cmdline()):
                    process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def memory_kills() -> int:
    """How many processes of this machine, or of this container, the kernel has killed for want of memory."""
    kills = 0
    for path in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        with contextlib.suppress(OSError, ValueError):
            counts = dict(line.split(" ", 1) for line in Path(path).read_text().splitlines())
            kills += int(counts.get("oom_kill", 0))
    return kills


def _hear(handler: Callable[[int, Any], object]) -> None:
    """Handle the signals that end a command, except those that whoever started it wants ignored (nohup). Unblock them."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _control(option: int, value: int) -> None:
    """prctl(2), which only Linux has."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
