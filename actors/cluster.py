"""The Ray cluster of a verb: joined or started, proven to see the run from every node, and to have room for it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import resources
from pipeline.config import Run
from pipeline.errors import EgrsdError, ResourceError, UserError
from pipeline.fit import machine
from pipeline.fit.machine import Facts, Line
from pipeline.store.directory import Store
from pipeline.store.lease import LEASE

REACH_S = 60.0
PROBE_S = 120.0
LOCAL_CPUS = 8  # logical ones: on a machine of its own, engines, ranks and data tasks take turns on the cores there are
_NODE_TYPE = "ray.io/node-group"  # the label of nodes that an autoscaler looks after

log = logging.getLogger(__name__)


def connect(address: str | None, environment: Mapping[str, str] | None = None, num_cpus: int = LOCAL_CPUS) -> None:
    """Join the cluster at `address` (or RAY_ADDRESS), or start one on this machine that ends with this process.

    `environment` is that of every worker process. On this machine Ray counts `num_cpus` logical CPUs: engines, ranks and data
    tasks take turns on the cores there are.
    Raises UserError when no cluster answers.
    """
    if ray.is_initialized():
        return
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_answers(target)
    options: dict[str, Any] = {"num_cpus": num_cpus, "include_dashboard": False} if target == "local" else {}
    try:
        ray.init(
            address=target,
            logging_level=logging.ERROR,
            log_to_driver=True,
            runtime_env={"env_vars": dict(environment or {})},
            **options,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _not_joined(error, target) from error


def _not_joined(error: Exception, target: str) -> UserError:
    """Why Ray would not let this driver in."""
    versions = re.findall(r"(?:Ray|Python): (\S+)", str(error)) if "Version mismatch" in str(error) else []
    if len(versions) == 4:
        sys.unraisablehook = lambda *_: None  # Ray's exit handler fails on what it had not begun, and says so after all else
        theirs, ours = (f"Ray {ray} and Python {python}" for ray, python in (versions[:2], versions[2:]))
        remedy = "Use the cluster's versions here, or `egrsd submit`, whose driver runs there"
        return UserError(f"the cluster has {theirs}, this driver {ours}", target, remedy)
    remedy = "Check --address or RAY_ADDRESS, and that RAY_AUTH_TOKEN or the token file fits the cluster"
    return UserError(f"no Ray cluster answers ({' '.join(str(error).split())[:300]})", target, remedy)


def check_reach(store: Store) -> None:
    """Raise UserError, naming the node, when one that is up does not see the run directory that this driver holds the lease of:
    a folder of this machine only, or a node that lacks endpoint or credentials."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    look, looks = ray.remote(num_cpus=0, max_retries=0)(_cannot_see), {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        looks[look.options(scheduling_strategy=there).remote(store)] = node["NodeManagerAddress"]
    for answered in ray.wait(list(looks), num_returns=len(looks), timeout=REACH_S)[0]:  # one that is slow to start is no error
        with contextlib.suppress(ray.exceptions.RayError):  # nor is one that has just gone
            if why := ray.get(answered):
                remedy = "Give --run a place that every node reaches, and every node the AWS_... settings or profile for it"
                raise UserError(f"node {looks[answered]} does not see this run ({why})", store.uri, remedy)


def _cannot_see(store: Store) -> str:
    """Inside a Ray task: why this node does not see the lease of the run, or nothing."""
    try:
        return "" if store.read_bytes(LEASE) is not None else f"{LEASE}, just written, is not there"
    except EgrsdError as error:
        return error.what


def check_room(demands: list[resources.Demand]) -> str | None:
    """What the cluster lacks now, where an autoscaler may add it; None where nothing is missing.

    Raises ResourceError where there is no autoscaler. Ray 2.60 tells nobody what its autoscaler may start (no part of it calls
    ReportClusterConfig), only that a node is of one of its types.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    try:
        resources.check(demands, [resources.Node(node["Resources"], node.get("Labels", {})) for node in alive])
    except ResourceError as error:
        if not any(node.get("Labels", {}).get(_NODE_TYPE) for node in alive):
            raise
        log.warning("%s. The autoscaler is asked for it", error.what)
        return error.what
    return None


def gather_nodes() -> dict[str, Facts | str]:
    """The facts of every node of the cluster by its address, each from a task that ran there, or why there are none."""
    probe, asked = ray.remote(num_cpus=0, max_retries=0)(machine.gather), {}
    for number, node in enumerate(node for node in ray.nodes() if node["Alive"]):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[f"{node['NodeManagerAddress']}/{number}"] = probe.options(scheduling_strategy=there).remote()
    found: dict[str, Facts | str] = {}
    for name, ref in asked.items():
        try:
            found[name] = ray.get(ref, timeout=PROBE_S)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            found[name] = f"failed ({type(error).__name__}). Install the same environment on every node"
    return found


def judge_room(run: Run, num_gpus: int, joined: bool) -> Line:
    """Whether a run's actors find their place in the cluster that was joined, or in what Ray would count on this machine.

    Raises ResourceError where they never will.
    """
    asked = resources.demands_of(run)
    if not joined:
        resources.check(asked, [resources.Node({"CPU": float(LOCAL_CPUS), "GPU": float(num_gpus)})])
    elif lacking := check_room(asked):
        return Line("warning", "resources", f"nodes that the autoscaler would have to start: {lacking}")
    return Line("ok", "resources", "engines, ranks and a data task find their place at one time")


def _check_answers(target: str) -> None:
    """Ray tries a dead address for minutes: knock first."""
    host, _, port = target.rpartition(":")
    if "://" in target or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(f"no Ray cluster answers ({error})", target, "Check --address or RAY_ADDRESS") from error
