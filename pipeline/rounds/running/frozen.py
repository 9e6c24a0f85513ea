"""Finds data tasks that have stopped, and ends them, so that Ray runs them again.

A data task may wait for an engine for hours, so time tells nothing. But a living Ray worker uses processor time all along: its
threads answer Ray. Two cores with a load of 16 gave an idle one 10 ms a second. A process whose processor time does not move is
stopped, or hangs in the kernel. A task of a machine that is merely slow is left alone, and so is one in a debugger.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.notices import NOTICE_S, Sparing

log = logging.getLogger(__name__)

LOOK_S = 5.0
ANSWER_S = 20.0  # for a look at another machine
IDLE = "ray::IDLE"  # of a worker that waits for a task. One that is stopped hangs the task that it gets, and keeps its title
Place = tuple[str, int, float, bool]  # machine, process id, time at which the process was created, whether it runs a task
Look = Callable[[str], dict[Place, float]]
End = Callable[[Place, str], None]


def here(title: str, session: str = "") -> dict[Place, float]:
    """Processor seconds of every Ray worker of this machine that has `title` in its title, or is an idle one of a Ray session.

    They are infinite for a process that runs at this moment or is in a debugger, and for one that is idle and not stopped.
    """
    found, machine = {}, socket.gethostname()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, IndexError):
            name = process.cmdline()[0]
            if name.startswith("ray::") and (title in name or _is_idle(process, name, session)):
                waits = title not in name and process.status() != psutil.STATUS_STOPPED  # an idle one
                place = machine, process.pid, process.create_time(), title in name
                found[place] = float("inf") if waits else used(process)
    return found


def used(process: psutil.Process) -> float:
    """Processor seconds of a process. They are infinite when it runs at this moment or is in a debugger. Raises psutil.Error."""
    if process.status() in {psutil.STATUS_RUNNING, psutil.STATUS_TRACING_STOP}:
        return float("inf")
    return float(sum(process.cpu_times()[:2]))


def _is_idle(process: psutil.Process, name: str, session: str) -> bool:
    """Whether a process is an idle worker of a session: of a raylet whose command line names the session."""
    parent = process.parent() if session and name.startswith(IDLE) else None
    return parent is not None and any(session in word for word in parent.cmdline())


def end_here(place: Place, title: str, session: str = "") -> None:
    """End a process of this machine that `here` found, if it is still the same."""
    if place in here(title, session):
        with contextlib.suppress(psutil.Error):
            psutil.Process(place[1]).kill()


@dataclass
class Frozen:
    """Which processes have used no processor time, and for how many seconds. Pure: the caller looks and keeps the time."""

    used: dict[Place, float] = field(default_factory=dict)
    still: dict[Place, float] = field(default_factory=dict)

    def update(self, seen: dict[Place, float], passed: float) -> None:
        """Note what was seen `passed` seconds after the look before."""
        same = {place for place, used in seen.items() if used == self.used.get(place) != float("inf")}
        self.still = {place: self.still.get(place, 0.0) + passed for place in same}
        self.used = seen


class Watch:
    """A thread that watches the data tasks of one execution from `start` to `end`.

    `title` is in the title of every process that runs such a task, and in that of no other process. `look` and `stop` see and end
    processes on all machines of the cluster.
    """

    def __init__(self, title: str, stall_timeout_s: float, look: Look | None = None, stop: End | None = None) -> None:
        self._title, self._stall_timeout_s = title, stall_timeout_s
        self._look, self._stop = look or _everywhere, stop or _end_there
        self._every = min(LOOK_S, stall_timeout_s / 4)
        self._ended, self._notices = threading.Event(), Sparing()
        self._thread = threading.Thread(target=self._run, name="egrsd-data-tasks", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _run(self) -> None:
        frozen, idle_s = Frozen(), 0.0
        while not self._ended.wait(self._every):
            try:
                frozen.update(self._look(self._title), self._every)  # a machine that stood still for a while blames no task
                idle_s = 0.0 if any(runs for *_, runs in frozen.used) else idle_s + self._every
                if idle_s >= NOTICE_S:
                    text = f"no data task has run for {idle_s:.0f} s: perhaps no CPU of the cluster is free."
                    self._notices.tell("no data task", text)
                for place, seconds in frozen.still.items():
                    self._judge(place, seconds)
            except Exception:  # the cluster may be ending; the next look tells more
                log.warning("data tasks cannot be looked at", exc_info=True)

    def _judge(self, place: Place, seconds: float) -> None:
        who = f"a data task (process {place[1]} on {place[0]})"
        if seconds >= self._stall_timeout_s:
            text = f"{who} did nothing for {seconds:.0f} s. It is ended, and its shards are done again."
            self._notices.tell("data task ended", text, who)
            self._stop(place, self._title)
        elif seconds >= NOTICE_S:
            after = f"It is ended after {self._stall_timeout_s:g} s"
            self._notices.tell("data task silent", f"{who} has done nothing for {seconds:.0f} s. {after}.", who)


def _everywhere(title: str) -> dict[Place, float]:
    """What `here` sees on every machine of the cluster that runs data tasks."""
    session = ray.get_runtime_context().get_session_name()
    found = here(title, session)
    refs = [on(node["NodeID"], here).remote(title, session) for node in _others()]
    for ref in ray.wait(refs, num_returns=len(refs), timeout=ANSWER_S)[0] if refs else ():
        with contextlib.suppress(ray.exceptions.RayError):  # that machine has gone, and its tasks with it
            found |= ray.get(ref)
    return found


def _end_there(place: Place, title: str) -> None:
    """End a process on the machine that `place` names."""
    session = ray.get_runtime_context().get_session_name()
    end_here(place, title, session)
    for node in _others():
        if node["NodeManagerHostname"] == place[0]:
            on(node["NodeID"], end_here).remote(place, title, session)


def _others() -> Iterable[dict[str, Any]]:
    """The living nodes on other machines, but for those of engines and ranks, which run no data task."""
    own = socket.gethostname()
    for node in ray.nodes():
        runs_tasks = node.get("Labels", {}).get("egrsd-role") not in {"rollout", "train"}
        if node["Alive"] and node["NodeManagerHostname"] != own and runs_tasks:
            yield node


def on(node_id: str, work: Callable[..., Any]) -> Any:
    """A function as a Ray task that runs on one node and takes no CPU."""
    return _task(work).options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))


@functools.cache
def _task(work: Callable[..., Any]) -> Any:
    """A function as a Ray task, made once: Ray's head keeps each task that was ever made as long as the driver lives."""
    return ray.remote(num_cpus=0, max_retries=0)(work)
