"""One driver per run: the driver holds a lease in the run directory and renews it with heartbeats.

`lease.json` names its holder and counts its heartbeats. A process that finds a lease watches the count. A living holder changes
it within TTL_S seconds, so the clocks of two machines need not agree. A holder on this machine whose process is gone is dead.

No lock works on every store. A driver therefore writes the lease, waits, and reads it again. When two drivers write at one time,
the later write stands and the other driver is refused. The wait is several times as long as the driver's own write, so an earlier
write of another driver has most likely arrived. If it has not, the holder sees the other name at its next heartbeat. That is
enough, since the lease only saves work: the holder then ends, with its ranks and tasks. Two drivers cannot damage data: their
commits do not mix, and the last entry wins.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated
from uuid import uuid4

import psutil
from pydantic import Field

from pipeline.errors import GONE, EgrsdError, StoreError, UserError
from pipeline.store import owner
from pipeline.store.directory import Store
from pipeline.store.documents import Count, Document, Text
from pipeline.store.files import RAY_FOLDER

LEASE = "lease.json"
BEAT_S, TTL_S, SETTLE_S = 5.0, 20.0, 0.3
REMEDY = "Delete the file when no command works on this run"
REACH = "Give --run a place that every node reaches, and every node the AWS_... settings or profile for it"


class LeaseFile(Document):
    """lease.json: who holds the run. `beats` counts its heartbeats."""

    token: Text
    holder: Text
    host: Text
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    beats: Count


def read_lease(store: Store) -> LeaseFile | None:
    """The lease of a run, or None. Raises StoreError for a damaged one."""
    return store.read_document(LEASE, LeaseFile, REMEDY)


def unseen(store: Store) -> str:
    """Why this machine does not see the lease of a run that some process holds; "" when it does."""
    try:
        return "" if store.read_bytes(LEASE) is not None else f"{LEASE} is not there"
    except EgrsdError as error:
        return error.what


@dataclass
class Lease:
    """A lease that this process holds. `stolen_by` names the driver that has taken it over, if one has."""

    store: Store
    token: str
    pid: int = field(default_factory=os.getpid)
    on_gone: Callable[[EgrsdError], None] | None = None
    stolen_by: str | None = None
    _end: threading.Event = field(default_factory=threading.Event)

    def is_lost(self) -> bool:
        """Whether another driver has taken the run over. It looks now: a process that stood still has no heartbeat yet."""
        if self.stolen_by is None:
            current = read_lease(self.store)
            self.stolen_by = current.holder if current is not None and current.token != self.token else None
        return self.stolen_by is not None

    def check(self) -> None:
        """Raise StoreError when another driver has taken the run over."""
        if self.is_lost():
            raise self._taken(str(self.stolen_by))

    def _taken(self, by: str) -> StoreError:
        return StoreError(f"{by} has taken over this run", self.store.uri, "Let it finish, or stop it and resume")

    def _tell(self, error: EgrsdError) -> None:
        if self.on_gone is not None:
            self.on_gone(error)

    def _beat(self) -> None:
        beats = 0
        while self.stolen_by is None and not self._end.wait(BEAT_S):
            with contextlib.suppress(EgrsdError, OSError):  # a disk that is full now may have space at the next beat
                current = read_lease(self.store)
                if current is not None and current.token != self.token:
                    self.stolen_by = current.holder
                    self._tell(self._taken(current.holder))  # at once: its ranks would publish over the new holder's policies
                    return
                if current is None and not self.store.names(""):  # a write would make the folder anew
                    self._tell(StoreError(GONE, self.store.uri, "Bring it back"))
                    return
                beats += 1
                _write(self.store, self, beats)


@contextlib.contextmanager
def held(
    store: Store,
    ttl_s: float = TTL_S,
    pid: int | None = None,
    on_gone: Callable[[EgrsdError], None] | None = None,
    on_free: Callable[[], None] = lambda: None,
) -> Iterator[Lease]:
    """Hold the run for the length of a block. A holder that is silent for `ttl_s` seconds counts as dead.

    `pid` is the process that is named as holder, this one by default; while it lives the lease is alive. A thread calls
    `on_gone` with the reason when the folder has gone during the block, or when another driver has taken the run over.
    `on_free` is called once nothing is held any more, and not when a signal has cut the end of the block short.

    Raises UserError, with the name of the holder, when another process works on the run.
    """
    lease = Lease(store, uuid4().hex, pid or os.getpid(), on_gone)
    if (holder := living_holder(store, ttl_s)) is not None:
        on_free()
        raise UserError(f"{holder} is working on this run", store.uri, "Wait for it or stop it, then run the same command again")
    thread = threading.Thread(target=lease._beat, name="egrsd-lease", daemon=True)
    try:  # from the first byte on: a signal may come at any moment
        begun = time.monotonic()
        _write(store, lease, 0)
        time.sleep(max(SETTLE_S, 5 * (time.monotonic() - begun)))
        current = read_lease(store)
        if current is None or current.token != lease.token:
            other = current.holder if current else "another driver"
            raise UserError(f"{other} has just started on this run", store.uri, "Wait for it or stop it")
        store.sweep()  # unfinished files of a driver that was killed, and of its workers
        thread.start()
        yield lease
    finally:
        lease._end.set()
        if thread.ident is not None:
            thread.join(BEAT_S)
        now = read_lease(store)
        if now is not None and now.token == lease.token:
            _give_back(store)
        on_free()


def free(store: Store, pid: int) -> None:
    """Give back the lease of process `pid` of this machine, whose work has ended without doing so. Remove its requests."""
    now = read_lease(store)
    if now is not None and (now.host, now.pid) == (owner.host(), pid):
        store.delete("control")
        _give_back(store)


def _give_back(store: Store) -> None:
    """Remove what a command has left in the run, and its lease last.

    A request to stop and the folder of Ray Train stay where a trainer did not end in time; it ends with this command.
    """
    store.sweep()
    store.request_stop(False)
    store.delete(RAY_FOLDER)
    store.delete(LEASE)


def living_holder(store: Store, ttl_s: float) -> str | None:
    """The process that works on this run, or None. A silent holder on another machine is watched for `ttl_s` seconds."""
    first = read_lease(store)
    if first is None or is_dead(first):
        return None
    deadline = time.monotonic() + ttl_s
    while time.monotonic() < deadline:
        time.sleep(min(0.2, ttl_s))
        now = read_lease(store)
        if now is None:
            return None
        if (now.token, now.beats) != (first.token, first.beats):
            return now.holder
    return None


def is_dead(lease: LeaseFile) -> bool:
    """Whether the holder of a lease was a process of this machine that has ended. False for a holder on another machine."""
    return lease.host == owner.host() and not psutil.pid_exists(lease.pid)


def _write(store: Store, lease: Lease, beats: int) -> None:
    holder = f"process {lease.pid} on {socket.gethostname()}"
    store.write_json(LEASE, {"token": lease.token, "holder": holder, "host": owner.host(), "pid": lease.pid, "beats": beats})
