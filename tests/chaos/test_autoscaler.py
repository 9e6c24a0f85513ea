"""A run on a cluster that Ray's own autoscaler grows and shrinks, with the node types of cluster.yaml on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from chaos_ground import MARK, ROOT, marked
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from waiting import free_port, until

from pipeline.store.directory import Store

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"  # nodes are processes here
SMALL = {"CPU": 2, "GPU": 1, "object_store_memory": 80 * 2**20}
SETS = (
    "rounds=2",
    "rollout.prompts_per_round=8",
    "rollout.prompts_per_shard=1",
    "rollout.group_size=4",
    "grade.advantage=running",
    "evaluation.problems=0",
    "engines.rollout.min=0",
    "engines.rollout.max=2",
    "engines.rollout.grow_after_s=0.2",
    "engines.rollout.shrink_after_s=1",
    "engines.rollout.placement={gpus: 1, resources: {rollout: 1}}",
    "train.placement={resources: {train: 1}}",  # a rank on a GPU needs NCCL, which a CPU build lacks
)


def small_cluster(address: str) -> dict[str, object]:
    """cluster.yaml with nodes for one engine or one rank each, which end after 6 idle seconds."""
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    types = {}
    for name, kind in cluster["available_node_types"].items():
        sizes = SMALL | {role: 1 for role in ("rollout", "train") if role in kind["resources"]}
        types[name] = {**kind, "node_config": {}, "resources": {"CPU": 8} if name == "head" else sizes}
        types[name]["max_workers"] = min(kind.get("max_workers", 0), 2)
    types["ray.head.default"] = types.pop("head") | {"max_workers": 0}  # the provider for one machine asks for this name
    kept = {key: cluster[key] for key in ("cluster_name", "max_workers", "upscaling_speed", "auth")}
    switches = dict.fromkeys(("disable_node_updaters", "disable_launch_config_check", "launch_multiple"), True)
    provider = {"type": "external", "module": PROVIDER, "gcs_address": address, "head_node_id": FAKE_HEAD_NODE_ID, **switches}
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    more = ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")
    return {
        **kept,
        **{key: [] for key in (*lists, *more)},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "provider": provider,
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 0.1,
    }


class Cluster:
    """A head with Ray's autoscaler, whose nodes are processes of this machine."""

    def __init__(self, folder: Path) -> None:
        self.mark, self.address = folder.name, f"127.0.0.1:{free_port()}"
        config = folder / "cluster.json"
        config.write_text(json.dumps(small_cluster(self.address)))
        self.environment = {
            **os.environ,
            MARK: self.mark,
            "TMPDIR": str(folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "RAY_NODE_TYPE_NAME": "ray.head.default",  # as `ray up` sets it
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=8", "--labels=egrsd-role=head"]
        place = [f"--port={self.address.split(':')[1]}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}/ray"]
        more = [f"--autoscaling-config={config}", "--include-dashboard=false", "--object-store-memory=100000000"]
        subprocess.run([*start, *place, *more], env=self.environment, check=True, timeout=120, stdout=subprocess.DEVNULL)
        self.state = GlobalState()
        self.state._initialize_global_state(GcsClientOptions.create(self.address, None, True, False))

    def nodes(self) -> list[str]:
        """The roles of the nodes that live."""
        return sorted(node["Labels"].get("egrsd-role", "?") for node in self.state.node_table() if node["Alive"])

    def run(self, uri: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a run on fake engines, a second for each batch."""
        command = [sys.executable, str(ROOT / "tests" / "chaos" / "driver.py"), uri, self.address, "0", "1", *SETS]
        with log.open("wb") as out:
            return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=out, stderr=subprocess.STDOUT)

    def close(self) -> None:
        """End all of it."""
        for process in marked(self.mark):
            with contextlib.suppress(psutil.Error):
                process.kill()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    folder = Path(tempfile.mkdtemp(prefix="grow"))  # short, since Ray puts sockets there
    made = Cluster(folder)
    yield made
    made.close()
    shutil.rmtree(folder, ignore_errors=True)


def test_rollout_nodes_come_for_a_run_and_go_when_no_engine_needs_them(cluster, tmp_path):
    until(lambda: cluster.nodes() == ["head", "train"], 120, "the head has started the node that cluster.yaml always wants")
    uri, log = str(tmp_path / "run"), tmp_path / "log"
    driver = cluster.run(uri, log)
    seen: list[int] = []
    while driver.poll() is None:
        if (count := cluster.nodes().count("rollout")) != (seen[-1] if seen else 0):
            seen.append(count)
        time.sleep(0.2)
    assert driver.returncode == 0, log.read_text()[-3000:]
    print(f"rollout nodes during the run: {seen}")
    assert max(seen) >= 1
    assert Store(uri).latest_policy() == 2
    until(lambda: cluster.nodes() == ["head", "train"], 120, "idle rollout nodes have ended, and the train node stays")
