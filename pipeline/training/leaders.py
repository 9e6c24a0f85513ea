"""Watches the actors with which Ray Train leads the ranks, above all its controller. One that has stopped is ended, like a rank.

They run on the driver's machine. Ray Train waits for them without a deadline. The controller may be in one call for half an hour,
while the cluster starts nodes. Nobody can ask it for a sign of life. Its processor time tells: see rounds/frozen.py.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable

import psutil

from pipeline.notices import NOTICE_S, tell
from pipeline.rounds.frozen import LOOK_S, Frozen, used

log = logging.getLogger(__name__)

CLASSES = ("TrainController", "PlacementGroupCleaner", "SynchronizationActor")  # names of Ray Train 2.60
Find = Callable[[], dict[psutil.Process, str]]


class Watch:
    """A thread that watches the leaders for the length of a block. `find` gives their processes, with the class of each."""

    def __init__(self, stall_timeout_s: float, find: Find | None = None) -> None:
        self._stall_timeout_s, self._find = stall_timeout_s, find or leaders
        self._every = min(LOOK_S, stall_timeout_s / 4)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="egrsd-leaders", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _run(self) -> None:
        frozen, host = Frozen(), socket.gethostname()
        while not self._ended.wait(self._every):
            try:
                found = {(host, p.pid, p.create_time(), True): (p, name) for p, name in self._find().items()}
                frozen.update({place: used(process) for place, (process, _) in found.items()}, self._every)
                for place, seconds in frozen.still.items():
                    self._judge(*found[place], seconds)
            except Exception:  # the cluster or a process may be ending; the next look tells more
                log.warning("Ray Train's actors cannot be looked at", exc_info=True)

    def _judge(self, process: psutil.Process, name: str, seconds: float) -> None:
        who = f"training: Ray Train's {name} (process {process.pid})"
        if seconds >= self._stall_timeout_s:
            tell(f"{name} ended", f"{who} did nothing for {seconds:.0f} s. It is ended, and Ray Train goes on without it.")
            process.kill()
        elif seconds >= NOTICE_S:
            tell(f"{name} silent", f"{who} has done nothing for {seconds:.0f} s. It is ended after {self._stall_timeout_s:g} s.")


def end_left() -> None:
    """End the leaders that a controller which died has left behind. Ray Train's own cleaner waits for a dashboard without end."""
    for process in leaders():
        with contextlib.suppress(psutil.Error):
            process.kill()


def leaders() -> dict[psutil.Process, str]:
    """The processes of Ray Train's leaders of this driver on its node, with the class of each."""
    import ray
    from ray._private.state import actors

    context = ray.get_runtime_context()
    alive = actors(job_id=ray.JobID.from_hex(context.get_job_id()), actor_state_name="ALIVE").values()
    mine = [actor for actor in alive if actor["Address"]["NodeID"] == context.get_node_id()]
    return {psutil.Process(actor["Pid"]): actor["ActorClassName"] for actor in mine if actor["ActorClassName"] in CLASSES}
