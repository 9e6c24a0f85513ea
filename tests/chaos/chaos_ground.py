"""A Ray cluster of three nodes to kill things in: who is where, what a kill leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psutil
from waiting import until

MARK = "EGRSD_CHAOS"  # in the environment of every process of a ground: what is left of it is found, whoever its parent is
TITLES = {"engine": "EngineActor", "pool": "Dispatcher", "task": "MapBatches(", "rank": "RayTrainWorker"}
RAY_KEEPS = ("_StatsActor", "_AutoscalingCoordinatorActor")  # Ray Data's own, one a cluster, detached; they reserve nothing
WORKER = {"num_cpus": 4, "num_gpus": 1, "resources": {"rollout": 2, "train": 1}, "object_store_memory": 80 * 2**20}
QUICK = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
QUICK |= {"health_check_timeout_ms": 3000}
ROOT = Path(__file__).resolve().parents[2]


def marked(mark: str) -> list[psutil.Process]:
    """Living processes of a ground."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def title(process: psutil.Process) -> str:
    """What a process says it is doing; empty once it is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""


class Ground:
    """A head that is never killed, two worker nodes that are, and the environment of the drivers.

    A worker has 4 CPUs, one GPU (as Ray counts them: nothing uses it), `rollout` for two engines and `train` for a rank.
    """

    def __init__(self, scratch: Path) -> None:
        from ray.cluster_utils import Cluster

        self.mark, self.tmp = uuid4().hex, scratch / "tmp"
        self.tmp.mkdir(parents=True)
        self.environment = {MARK: self.mark, "TMPDIR": str(self.tmp), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self._marked_environment():
            head = {"num_cpus": 1, "_system_config": QUICK, "object_store_memory": 80 * 2**20}
            head |= {"include_dashboard": True, "dashboard_port": 0}  # Ray Train's own cleaner of a dead driver asks it who lives
            self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.add_node()
        self.add_node()

    @property
    def address(self) -> str:
        """Where a driver finds it."""
        return self.cluster.address

    @contextlib.contextmanager
    def _marked_environment(self) -> Iterator[None]:
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def add_node(self) -> None:
        """One more worker."""
        with self._marked_environment():
            self.cluster.add_node(**WORKER)

    def driver(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a driver; what it prints is appended to `log`."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=os.environ | self.environment, stdout=out, stderr=subprocess.STDOUT
            )

    def victims(self, kind: str) -> list[psutil.Process]:
        """Living processes of a kind: engine, pool, task or rank."""
        named = {process: title(process).split(" ")[0] for process in marked(self.mark)}
        return [process for process, name in named.items() if name.startswith("ray::") and TITLES[kind] in name]

    def lose_node(self, which: int, at_raylet: bool) -> tuple[int, str]:
        """Kill a worker node with SIGKILL: its raylet alone, which takes the workers along, or all its processes at once.

        Returns the raylet's pid and what ran there.
        """
        node = sorted(self.cluster.worker_nodes, key=lambda n: n.unique_id)[which % len(self.cluster.worker_nodes)]
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        ran = [title(child) for child in raylet.children() if title(child).startswith("ray::")]
        busy = sorted(name.removeprefix("ray::") for name in ran if not name.startswith("ray::IDLE"))
        if at_raylet:
            raylet.send_signal(signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=False)
        return raylet.pid, ", ".join(busy) or "nothing"

    def stop_node(self, which: int) -> tuple[int, str]:
        """Stop the raylet of a worker node, until the head counts the node as dead. Then end all of it, as its owner would."""
        node = sorted(self.cluster.worker_nodes, key=lambda n: n.unique_id)[which % len(self.cluster.worker_nodes)]
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        ran = [title(child).removeprefix("ray::") for child in raylet.children() if title(child).startswith("ray::")]
        raylet.send_signal(signal.SIGSTOP)

        def dead() -> bool:
            nodes = {entry["NodeID"]: entry["Alive"] for entry in self.cluster.global_state.node_table()}
            return not nodes[node.node_id]

        until(dead, 120, "the head has noticed a stopped raylet")
        self.cluster.remove_node(node, allow_graceful=False)
        return raylet.pid, ", ".join(sorted(name for name in ran if not name.startswith("IDLE"))) or "nothing"

    def reserved(self) -> dict[str, float]:
        """CPUs, GPUs and custom resources that somebody holds."""
        state = self.cluster.global_state
        total, free = state.cluster_resources(), state.available_resources()
        names = [name for name in total if "memory" not in name and not name.startswith("node:")]
        return {name: total[name] - free.get(name, 0) for name in names if total[name] - free.get(name, 0) > 1e-6}

    def actors(self) -> list[str]:
        """Actors that are not dead."""
        table = self.cluster.global_state.actor_table(None).values()
        living = [actor for actor in table if actor["State"] != "DEAD" and actor["ActorClassName"] not in RAY_KEEPS]
        return [f"{actor['ActorClassName']} {actor['State']}" for actor in living]

    def remains(self) -> list[str]:
        """Processes that are no part of an idle cluster."""
        found = {process: title(process) for process in marked(self.mark)}
        ours = {process: name for process, name in found.items() if name and not _belongs_to_ray(process, name)}
        return [f"{process.pid} {name[:160]}" for process, name in ours.items()]

    def close(self) -> None:
        """End the cluster and all that is left of it."""
        self.cluster.shutdown()
        for process in marked(self.mark):
            with contextlib.suppress(psutil.Error):
                process.kill()


def _belongs_to_ray(process: psutil.Process, name: str) -> bool:
    """Whether a process is one of an idle Ray: its services, children of the dashboard, workers that wait for a task."""
    keeps = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", *(f"ray::{actor}" for actor in RAY_KEEPS))
    parts = ("/ray/core/src/ray/", "/ray/_private/", "/ray/dashboard/", "/ray/autoscaler/")
    if name.startswith(keeps) or any(part in name for part in parts):
        return True
    with contextlib.suppress(psutil.Error):
        return any("/ray/dashboard/dashboard.py" in title(parent).split(" --")[0] for parent in process.parents())
    return False
