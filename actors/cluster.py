"""The Ray cluster of a verb: join or start it, check that every node sees the run, and that the run finds room."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import ray
from ray import cloudpickle
from ray._private import auto_init_hook, utils
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import resources, watch
from actors.folders import ray_folder
from actors.inference.engine import judge_entropy
from actors.inference.startup import EXACT_ENTROPY
from actors.token import join_with_token, needs_file, token_file
from pipeline.config import Placement, Run
from pipeline.errors import ClusterError, EgrsdError, ResourceError, UserError
from pipeline.fit import builds, code, machine
from pipeline.fit.machine import Facts, Line, processors
from pipeline.live.lease import REACH, unseen
from pipeline.notices import NOTICE_S, late, tell
from pipeline.store.directory import Store

REACH_S = 60.0
PROBE_S = 120.0
LOCAL_CPUS = 8  # least logical CPUs of a cluster on one machine, where engines, ranks and data tasks share the real cores
_ENTROPY = "exact entropy"
_NODE_TYPE = "ray.io/node-group"  # Ray's autoscalers give this label to the nodes they start

log = logging.getLogger(__name__)


def is_local(address: str | None) -> bool:
    """Whether a verb with this `--address` starts a Ray of its own on this machine."""
    return (address or os.environ.get("RAY_ADDRESS") or "local") == "local"


def connect(address: str | None, environment: Mapping[str, str] | None = None) -> bool:
    """Join the cluster at `address` or RAY_ADDRESS. Without either, start one here that ends with this process.

    Every worker process gets the variables of `environment`, and reads text as UTF-8 whatever its locale is: torch has files
    that no ASCII is. A cluster on this machine is one `local_node`. Returns False when
    this process had joined one before. Raises UserError when no cluster answers, or when a cluster cannot start here.
    """
    if ray.is_initialized():
        return False
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_answers(target)
    if target != "local":
        join_with_token()
    auto_init_hook.enable_auto_connect = False  # a thread that asks after the end would start another Ray, which nobody ends
    who = "Ray to start on this machine" if target == "local" else f"the Ray cluster at {target}"
    try:
        with late("cluster", f"waiting for {who}: for {NOTICE_S:g} s so far."), _sigterm_stays_ours():
            ray.init(
                address=target,
                logging_level=logging.ERROR,
                log_to_driver=True,
                runtime_env={"env_vars": {"PYTHONUTF8": "1", **(environment or {}), **code.environment()}},
                job_config=_Job(),
                **(_local_options() if target == "local" else {}),
            )
    except Exception as error:  # Ray raises a bare Exception when a part of it starts too slowly
        if target == "local":
            raise _not_started(error) from error
        if isinstance(error, (ConnectionError, ValueError, RuntimeError)):
            raise _not_joined(error, target) from error
        raise
    return True


@contextlib.contextmanager
def _sigterm_stays_ours() -> Iterator[None]:
    """Keep Ray's start from taking SIGTERM. Its handler calls sys.exit, which that start may catch, and the signal is lost."""
    taken, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = taken


def _not_started(error: Exception) -> UserError | ClusterError:
    """The error for a Ray that did not start on this machine: it names a full folder where there is one."""
    if (full := watch.full_folder()) is not None:
        return full
    what = f"Ray did not start on this machine ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    return ClusterError(what, "", "Run the same command again; a crowded machine may have been too slow. --debug shows more")


def _local_options() -> dict[str, Any]:
    """Options of Ray for a cluster here. Its folder has a private parent, since Ray lets everybody write into its own."""
    _keep_token_private()
    here = local_node().resources
    counted = {"num_cpus": int(here["CPU"]), "num_gpus": int(here["GPU"])}
    # the workers that Ray would start ahead lack the variables of this job, so no task or actor of it could use them
    options = {"include_dashboard": False, "_temp_dir": str(ray_folder())}
    return {**counted, **options, "_system_config": {"prestart_worker_first_driver": False}}


def local_node(num_gpus: int | None = None) -> resources.Node:
    """What a Ray that starts on this machine counts. `num_gpus`: cards that torch can use; None asks torch.

    With GPUs these are the real CPUs, and LOCAL_CPUS at the least. Without GPUs they are LOCAL_CPUS: engines, ranks and data
    tasks take turns on the real cores there.
    """
    if num_gpus is None:
        num_gpus = machine.num_cards()
    cpus = max(LOCAL_CPUS, processors()) if num_gpus else LOCAL_CPUS
    return resources.Node({"CPU": float(cpus), "GPU": float(num_gpus)})


def _keep_token_private() -> None:
    """Have a token file that only its user can read. Ray would make one that everybody can read."""
    path = token_file()
    if not needs_file():
        return
    with contextlib.suppress(OSError):  # a home that cannot be written: Ray tells
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
        except FileExistsError:
            if path.stat().st_mode & 0o077:  # an earlier Ray made it
                path.chmod(0o600)


class _Job(JobConfig):  # type: ignore[misc]
    """A job whose workers import the driver's packages.

    Ray puts the driver's current folder first on the path of its workers, where any folder called `jobs` would hide ours. It has
    no option against that, so the path is set where Ray reads it.
    """

    def _serialize(self) -> str:
        self._py_driver_sys_path = code.search_path()
        serialized: str = super()._serialize()
        return serialized


def _not_joined(error: Exception, target: str) -> UserError:
    """The error for a driver that Ray refused: it names both sides' versions when they differ."""
    versions = re.findall(r"(?:Ray|Python): (\S+)", str(error)) if "Version mismatch" in str(error) else []
    if len(versions) == 4:
        sys.unraisablehook = lambda *_: None  # Ray's exit handler would print its own failure after our message
        theirs, ours = (f"Ray {ray} and Python {python}" for ray, python in (versions[:2], versions[2:]))
        remedy = "Use the cluster's versions here, or `egrsd submit`, whose driver runs there"
        return UserError(f"the cluster has {theirs}, this driver {ours}", target, remedy)
    remedy = "Check --address or RAY_ADDRESS. For a cluster with a token set RAY_AUTH_MODE=token; the token must fit the cluster"
    return UserError(f"no Ray cluster answers ({' '.join(str(error).split())[:300]})", target, remedy)


def check_reach(store: Store) -> None:
    """Raise UserError that names a live node which does not see this run directory. The driver must hold its lease.

    The usual causes are a folder that only this machine has, and a node without the store's endpoint or credentials.
    A node that is slow to answer, or that has just ended, raises nothing.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    for ref, node in _answered(_on_each(nodes, unseen, store), "whether it sees the run"):
        with contextlib.suppress(ray.exceptions.RayError):  # the node has just ended
            if why := ray.get(ref):
                raise UserError(f"node {node['NodeManagerAddress']} does not see this run ({why})", store.uri, REACH)


def check_nodes() -> None:
    """Raise UserError that names a live node whose code is not the driver's, or whose builds are not those of its role.

    pipeline/fit/builds.py says what a role is. A node that joins later is looked at by the first task or actor on it.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    for node_id, found in _look_at(list(nodes.values())).items():
        node = nodes[node_id]
        if differs := code.difference(found, code.here()["hashes"]):
            raise UserError(differs, f"node {node['NodeManagerAddress']} ({found['host']})", code.REMEDY)
        builds.check_node(node, found)


def _look_at(nodes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the processes of each node import, by node id. A node that is slow to answer, or has just ended, is left out."""
    cloudpickle.register_pickle_by_value(code)  # the node may lack this module, or have another of its name
    try:
        refs = _on_each(nodes, code.look)
    finally:
        cloudpickle.unregister_pickle_by_value(code)
    found = {}
    for ref, node in _answered(refs, "which code it has"):
        with contextlib.suppress(ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError):
            found[node["NodeID"]] = ray.get(ref)
    return found


def _on_each(nodes: list[dict[str, Any]], work: Callable[..., Any], *arguments: Any) -> dict[Any, dict[str, Any]]:
    """The calls of `work` as a task on each node: its node by call."""
    task = ray.remote(num_cpus=0, max_retries=0)(work)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    return {task.options(scheduling_strategy=p).remote(*arguments): node for p, node in zip(places, nodes, strict=True)}


def _answered(calls: dict[Any, dict[str, Any]], what: str, patience_s: float = REACH_S) -> list[tuple[Any, dict[str, Any]]]:
    """The calls that have ended within some seconds, with their nodes. It tells which nodes are waited for, and given up."""
    ready, silent = ray.wait(list(calls), num_returns=len(calls), timeout=min(NOTICE_S, patience_s))
    if silent:
        tell("nodes", f"waiting for {_names(silent, calls)} to say {what}: for {NOTICE_S:g} s so far.")
        late_ones, silent = ray.wait(silent, num_returns=len(silent), timeout=max(0.0, patience_s - NOTICE_S))
        ready += late_ones
    if silent:
        tell("silent nodes", f"{_names(silent, calls)} did not say {what} in {patience_s:g} s, and is not waited for any more.")
    return [(ref, calls[ref]) for ref in ready]


def _names(silent: list[Any], calls: dict[Any, dict[str, Any]]) -> str:
    """Some nodes in words: the addresses of the first ones, and how many there are."""
    names = [calls[ref]["NodeManagerAddress"] for ref in silent]
    return f"node{'s' if len(names) > 1 else ''} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


def has_autoscaler(nodes: list[dict[str, Any]]) -> bool:
    """Whether an autoscaler started one of these nodes of Ray, so that it may start others."""
    return any(node["Alive"] and node.get("Labels", {}).get(_NODE_TYPE) for node in nodes)


def check_room(demands: list[resources.Demand]) -> str | None:
    """What the cluster lacks for `demands` and an autoscaler may add; None when nothing is missing.

    Raises ResourceError when something is missing and there is no autoscaler. Ray 2.60 does not tell what its autoscaler may
    start, because nothing in it calls ReportClusterConfig. A node's label only tells that an autoscaler started it.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    try:
        resources.check(demands, [resources.Node(node["Resources"], node.get("Labels", {})) for node in alive])
    except ResourceError as error:
        if not has_autoscaler(alive):
            raise
        log.warning("%s. The autoscaler is asked for it", error.what)
        return error.what
    return None


def gather_nodes() -> dict[str, Facts | str]:
    """The facts of every node by its address, gathered by a task on that node. A node that fails gives the reason instead."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    calls = _on_each(nodes, machine.gather)
    answered = dict(_answered(calls, "what it has", PROBE_S))
    facts: dict[str, Facts | str] = {}
    for number, (ref, node) in enumerate(calls.items()):
        name = f"{node['NodeManagerAddress']}/{number}"
        try:
            facts[name] = ray.get(ref) if ref in answered else f"gave no answer in {PROBE_S:g} s. Check that the node is alive"
        except ray.exceptions.RayError as error:
            facts[name] = f"failed ({type(error).__name__}). Install the same environment on every node"
    return facts


def judge_room(run: Run, num_gpus: int, joined: bool) -> Line:
    """Whether a run's actors find room in the `joined` cluster, or in the cluster that Ray would start on this machine.

    Raises ResourceError when they never will.
    """
    demands = resources.demands_of(run)
    if not joined:
        resources.check(demands, [local_node(num_gpus)])
    elif lacking := check_room(demands):
        return Line("warning", "resources", f"nodes that the autoscaler would have to start: {lacking}")
    return Line("ok", "resources", "engines, ranks and a data task find their place at one time")


def entropy_there(run: Run) -> Line:
    """The entropies that a real engine gives on a node of the cluster, for `egrsd doctor`. A task starts the engine there.

    The task asks Ray for what an engine of the run asks for. The line is a warning when no node has room for it now, or when
    there is no answer within `start_timeout_s`.
    """
    pool = run.engines.rollout
    placement = resources.placement_of(pool)
    if why := _no_room(placement):
        return Line("warning", _ENTROPY, f"not checked: no node can start an engine now ({why})")
    # Variables of its own give the task a new process. Another task may have begun to use CUDA in an older one.
    own = {"env_vars": {EXACT_ENTROPY: "1"}}
    task = ray.remote(max_retries=0, max_calls=1)(_entropy_here).options(runtime_env=own, **resources.options(placement))
    ref = task.remote(run)
    if not ray.wait([ref], timeout=pool.start_timeout_s)[0]:
        ray.cancel(ref, force=True)
        return Line("warning", _ENTROPY, f"not checked: no engine was up within start_timeout_s {pool.start_timeout_s:g}")
    try:
        return cast(Line, ray.get(ref))
    except ray.exceptions.RayError as error:
        return Line("error", _ENTROPY, f"the engine's process ended on its node ({' '.join(str(error).split())[:300]})")


def _no_room(placement: Placement) -> str:
    """Why no node can start an actor or a task with this placement now; "" when one can."""
    try:
        lacking = check_room([resources.Demand("engines.rollout", 1, placement)])
    except ResourceError as error:
        lacking = error.what
    free = ray.available_resources().get("GPU", 0.0)
    return lacking or (f"{placement.gpus:g} GPU are asked for, {free:g} are free" if free < placement.gpus else "")


def _entropy_here(run: Run) -> Line:
    """What `judge_entropy` finds on the node of this task. An error of this project is a line too."""
    node = ray.util.get_node_ip_address()
    try:
        found = judge_entropy(run, math.ceil(run.engines.rollout.placement.gpus))
    except EgrsdError as error:
        return Line("error", _ENTROPY, f"node {node}: {error}")
    return replace(found, text=f"{found.text}, on node {node}")


def _check_answers(target: str) -> None:
    """Raise UserError when nothing listens at HOST:PORT. Ray itself would try a dead address for minutes."""
    host, _, port = target.rpartition(":")
    if "://" in target or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(f"no Ray cluster answers ({error})", target, "Check --address or RAY_ADDRESS") from error
