"""Watches the actors of Ray Train: those that lead, above all its controller, and the ranks. One that has stopped is ended.

Ray Train waits for its leaders without a deadline. The controller may be in one call for half an hour, while the cluster starts
nodes. Nobody can ask it for a sign of life. Ray Train's health check hears of a stopped rank, but only once the whole worker
group has started: before that it waits for each rank without a deadline. Processor time tells of both: see
rounds/running/frozen.py.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import psutil
import ray
from ray._private.state import actors

from pipeline.notices import NOTICE_S, Sparing
from pipeline.rounds.running.frozen import ANSWER_S, LOOK_S, Frozen, Place, on, used

log = logging.getLogger(__name__)

CLASSES = ("TrainController", "PlacementGroupCleaner", "SynchronizationActor")  # names of Ray Train 2.60
RANK = "RayTrainWorker"
_RANK_PATIENCE = 2.0  # a rank is ended after so many times the deadline, since the health check comes first where there is one
Seen = dict[Place, tuple[float, str]]  # processor seconds and class of each process


class Watch:
    """A thread that watches Ray Train's actors for the length of a block. `find` sees their processes on all machines.

    asked: what the ranks ask of the cluster, in words. While no rank has started, it is told who is waited for.
    """

    def __init__(self, stall_timeout_s: float, find: Callable[[], Seen] | None = None, asked: str = "") -> None:
        self._stall_timeout_s, self._find, self._asked = stall_timeout_s, find or everywhere, asked
        self._every = min(LOOK_S, stall_timeout_s / 4)
        self._ended, self._notices = threading.Event(), Sparing()
        self._thread = threading.Thread(target=self._run, name="egrsd-leaders", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _run(self) -> None:
        frozen, waited_s = Frozen(), 0.0
        while not self._ended.wait(self._every):
            try:
                found = self._find()
                waited_s = 0.0 if any(name == RANK for _, name in found.values()) else waited_s + self._every
                if self._asked and waited_s >= NOTICE_S:
                    text = f"training: no rank has started for {waited_s:.0f} s. They ask for {self._asked}."
                    self._notices.tell("ranks without a place", text)
                frozen.update({place: seconds for place, (seconds, _) in found.items()}, self._every)
                for place, seconds in frozen.still.items():
                    self._judge(place, found[place][1], seconds)
            except Exception:  # the cluster or a process may be ending; the next look tells more
                log.warning("Ray Train's actors cannot be looked at", exc_info=True)

    def _judge(self, place: Place, name: str, seconds: float) -> None:
        deadline = self._stall_timeout_s * (_RANK_PATIENCE if name == RANK else 1.0)
        who = f"training: Ray Train's {name} (process {place[1]})"
        if seconds >= deadline:
            text = f"{who} did nothing for {seconds:.0f} s. It is ended, and Ray Train goes on without it."
            self._notices.tell(f"{name} ended", text, who)
            _end(place)
        elif seconds >= NOTICE_S:
            text = f"{who} has done nothing for {seconds:.0f} s. It is ended after {deadline:g} s."
            self._notices.tell(f"{name} silent", text, who)


def here(classes: dict[int, str]) -> Seen:
    """What processes of this machine have used, by their ids, each with its class. One that has gone is left out."""
    found: Seen = {}
    for pid, name in classes.items():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            found[socket.gethostname(), pid, process.create_time(), True] = used(process), name
    return found


def everywhere() -> Seen:
    """What Ray Train's actors of this driver have used: leaders on this machine, and ranks on every machine."""
    own, classes = ray.get_runtime_context().get_node_id(), defaultdict[str, dict[int, str]](dict)
    for actor in _alive():
        node, name = actor["Address"]["NodeID"], actor["ActorClassName"]
        if name == RANK or (name in CLASSES and node == own):
            classes[node][actor["Pid"]] = name
    found = here(classes.pop(own, {}))
    refs = [on(node, here).remote(there) for node, there in classes.items()]
    for ref in ray.wait(refs, num_returns=len(refs), timeout=ANSWER_S)[0] if refs else ():
        with contextlib.suppress(ray.exceptions.RayError):  # that machine has gone, and its ranks with it
            found |= ray.get(ref)
    return found


def _end(place: Place) -> None:
    """End a process on the machine that `place` names."""
    if place[0] == socket.gethostname():
        end_here(place)
        return
    for node in ray.nodes():
        if node["Alive"] and node["NodeManagerHostname"] == place[0]:
            on(node["NodeID"], end_here).remote(place)


def end_here(place: Place) -> None:
    """End a process of this machine, if it is still the same."""
    with contextlib.suppress(psutil.Error):
        if (process := psutil.Process(place[1])).create_time() == place[2]:
            process.kill()


def end_left() -> None:
    """End the leaders that a controller which died has left behind. Ray Train's own cleaner waits for a dashboard without end."""
    for process in leaders():
        with contextlib.suppress(psutil.Error):
            process.kill()


def leaders() -> dict[psutil.Process, str]:
    """The processes of Ray Train's leaders of this driver on its node, with the class of each."""
    own = ray.get_runtime_context().get_node_id()
    mine = (actor for actor in _alive() if actor["Address"]["NodeID"] == own)
    return {psutil.Process(actor["Pid"]): actor["ActorClassName"] for actor in mine if actor["ActorClassName"] in CLASSES}


def _alive() -> Iterable[dict[str, Any]]:
    """The living actors of this driver, as Ray's state API has them."""
    job = ray.get_runtime_context().get_job_id()
    return actors(job_id=ray.JobID.from_hex(job), actor_state_name="ALIVE").values()  # type: ignore[no-any-return]
