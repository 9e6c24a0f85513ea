"""A cluster of three node types on this machine, and a run on it with fake engines and real ranks. Writes as JSON what ran where.

    python tests/three_nodes.py RUN FILE

It runs in a process of its own, because one process cannot connect to this cluster and to the tests' Ray.
"""

import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import psutil
import ray
from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
from ray._private.state import actors
from ray._private.worker import global_worker
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.cluster_utils import Cluster

from actors.cluster import check_reach, connect
from actors.fakes import UNWATCHED, Behaviour, FakeEngine
from jobs import compare, evaluate
from jobs.distill import distill
from jobs.screen.terminal import divert_output
from jobs.settle import Choices
from jobs.stage import Redo, run_stage
from jobs.train import Target, train_committed
from pipeline.errors import UserError
from pipeline.store.directory import Store

SETS = [
    *UNWATCHED,
    "rounds=2",
    "shards_here=0",  # tasks of Ray Data compute, and the test sees where
    "rollout.prompts_per_round=10",
    "rollout.prompts_per_shard=1",
    "rollout.group_size=4",
    "grade.advantage=running",
    "evaluation.problems=0",
    "engines.inflight_shards=2",
    "engines.rollout.max=2",
    "engines.rollout.grow_after_s=0.2",
    "engines.rollout.placement.resources={rollout: 1}",
    "train.placement.resources={train: 1}",
]
# no node starts workers that nobody asked for, or gathers figures
QUICK = {"prestart_worker_first_driver": False, "enable_metrics_collection": False}


class Watcher(threading.Thread):
    """Samples on which nodes actors and data tasks run. When an engine waits for a node, keeps that demand and adds the node."""

    def __init__(self, cluster):
        super().__init__(daemon=True)
        self.cluster, self.roles, self.raylets = cluster, {}, {}
        self.found, self.engines, self.demand = {k: set() for k in ("EngineActor", "Dispatcher", "rank", "data")}, {}, None
        self.rows, self.ended, self.added, self.fresh = {}, threading.Event(), [], None
        self.error = None

    def add(self, role, **options):
        """Add a node of a role, with room for one engine or one rank."""
        labels = {"egrsd-role": role.split()[0]}
        node = self.cluster.add_node(num_cpus=2, labels=labels, object_store_memory=100 * 2**20, **options)
        self.know(role, node)
        return node

    def know(self, role, node):
        self.roles[node.node_id] = role
        self.raylets[node.all_processes["raylet"][0].process.pid] = role

    def run(self):
        while not self.ended.wait(0.1):
            try:
                if ray.is_initialized():
                    self.look()
            except Exception:  # while Ray connects, its state cannot be asked yet; a look that always fails is told at the end
                self.error = traceback.format_exc()

    def look(self):
        for actor in actors().values():
            node = self.role(actor["Address"]["NodeID"]) if actor["State"] == "ALIVE" else None
            if actor["State"] == "ALIVE" and actor["ActorClassName"] == "EngineActor":
                self.found["EngineActor"].add(node)
                self.engines[actor["Name"]] = node
            elif actor["State"] == "ALIVE" and actor["ActorClassName"] == "RayTrainWorker":
                self.found["rank"].add(node)
            elif actor["State"] == "PENDING_CREATION" and actor["ActorClassName"] == "EngineActor":
                self.serve()
            elif actor["State"] == "ALIVE" and actor["ActorClassName"] == "Dispatcher":
                self.found["Dispatcher"].add(node)
        for pid, role in self.raylets.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(child.name().startswith("ray::Map") for child in psutil.Process(pid).children(recursive=True)):
                    self.found["data"].add(role)
        for name, rows in self.answered():
            self.rows[self.engines.get(name)] = rows
        if codes := [code for node in self.added if (code := node.poll()) is not None]:
            raise RuntimeError(f"ray start ended with exit code {codes}, so this node is missing")

    def serve(self):
        """While an engine waits, keep what the cluster asks of its autoscaler, and add the node.

        The first engine waits on a cluster that has no rollout node yet. The second waits while the first serves.
        """
        if self.demand is not None or (self.fresh is not None and not self.engines):
            return
        asked = get_cluster_resource_state(global_worker.gcs_client).pending_resource_requests
        if not any("rollout" in request.request.resources_bundle for request in asked):
            return  # the request comes some time after the actor begins to wait
        told = [request.SerializeToString().hex() for request in asked]
        if self.fresh is None:
            self.fresh = told
        else:
            self.demand = told
        ray_start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={self.cluster.address}"]
        size = ["--num-cpus=2", "--object-store-memory=100000000", "--labels=egrsd-role=rollout"]
        self.added.append(subprocess.Popen([*ray_start, *size, '--resources={"rollout": 1}']))
        self.raylets[self.added[-1].pid] = "rollout added" if self.demand else "rollout"

    def role(self, node):
        """The role of a node. The first node that was added for an engine is "rollout", the second "rollout added"."""
        return self.roles.setdefault(node, "rollout added" if "rollout" in self.roles.values() else "rollout")

    def answered(self):
        """Pairs of an engine's name and its rows, as its pool counts them."""
        try:
            pool = ray.get(ray.get_actor("rollout-pool").overview.remote(), timeout=5)
            return [(engine.name, engine.rows) for engine in pool.engines if engine.rows]
        except Exception:  # the pool does not exist yet, or no longer
            return []


def mismatch(address):
    """The message to a driver whose versions differ from the cluster's."""
    connect(address)
    theirs = json.dumps({"ray_version": "2.1.0", "python_version": "3.9.1"}).encode()
    global_worker.gcs_client.internal_kv_put(CLUSTER_METADATA_KEY, theirs, True, b"cluster")
    ray.shutdown()
    try:
        connect(address)
    except UserError as error:
        return str(error)
    return ""


def unreached(watcher, uri):
    """The message of each verb that works on a cluster, by its name, when a node has another endpoint than the driver."""
    address = watcher.cluster.address
    connect(address)
    store = Store(f"{uri}-other")
    store.write_json("lease.json", {})
    check_reach(store)
    watcher.add("astray", env_vars={"AWS_ENDPOINT_URL": "http://127.0.0.1:1"})
    few = "evaluation.problems=2"
    asked = evaluate.Options("last", [], None, [few])
    compared = compare.Options("demo", "grpo", "0", None, [*SETS, few], None)
    more = Choices(sets=["rounds=3"], accept_changes=True)
    verbs = {
        "distill": lambda: distill(uri, more, address, engine_class=FakeEngine),
        "stage": lambda: run_stage(uri, Redo("label", "0", force=True), address),
        "train": lambda: train_committed(uri, 0, [], address, False, Target(replace=True)),
        "evaluate": lambda: evaluate.evaluate(uri, asked, address, False, FakeEngine),
        "compare": lambda: compare.compare(f"{uri}-compared", compared, address, False, FakeEngine),
    }
    told = {name: said(verb) for name, verb in verbs.items()}
    ray.shutdown()
    return told


def said(verb):
    """The text that a refused verb prints, or "" when the verb is not refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "said"
        try:
            with divert_output(path):
                verb()
        except SystemExit as ended:
            return path.read_text() if ended.code == 2 else ""
    return ""


def main(uri, path):
    head = {"num_cpus": 4, "labels": {"egrsd-role": "head"}, "include_dashboard": False, "object_store_memory": 150 * 2**20}
    head["_system_config"] = QUICK
    os.environ["RAY_NODE_TYPE_NAME"] = "head"  # `ray up` and KubeRay set this too; it makes Ray expect an autoscaler
    cluster = Cluster(initialize_head=True, head_node_args=head)
    del os.environ["RAY_NODE_TYPE_NAME"]
    watcher = Watcher(cluster)
    watcher.know("head", cluster.head_node)
    watcher.add("train", resources={"train": 1})
    watcher.start()
    begun = time.monotonic()
    slow = functools.partial(FakeEngine, behaviour=Behaviour(batch_s=3.0))
    try:
        distill(uri, Choices("demo", SETS), cluster.address, engine_class=slow)
    except SystemExit:
        print(f"the last error of the watcher: {watcher.error}", file=sys.stderr)
        raise
    watcher.ended.set()
    watcher.join()
    ray.shutdown()
    told = {
        "where": {what: sorted(nodes, key=str) for what, nodes in watcher.found.items()},
        "rows": watcher.rows,
        "demand": watcher.demand,
        "fresh": watcher.fresh,
        "seconds": time.monotonic() - begun,
        "unreached": unreached(watcher, uri),
        "mismatch": mismatch(cluster.address),
    }
    with open(path, "w") as file:
        json.dump(told, file)
    for process in watcher.added:
        process.terminate()
        process.wait()
    for node in cluster.list_all_nodes():  # `shutdown` would believe that the refused driver still uses the head
        node.kill_all_processes(check_alive=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
