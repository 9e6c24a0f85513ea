"""The Ray cluster of a verb: joined or started, and proven to see the run from every node."""

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

from pipeline.errors import EgrsdError, UserError
from pipeline.store.directory import Store
from pipeline.store.lease import LEASE

REACH_S = 60.0


def connect(address: str | None, environment: Mapping[str, str] | None = None, num_cpus: int = 8) -> None:
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


def _check_answers(target: str) -> None:
    """Ray tries a dead address for minutes: knock first."""
    host, _, port = target.rpartition(":")
    if "://" in target or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(f"no Ray cluster answers ({error})", target, "Check --address or RAY_ADDRESS") from error
