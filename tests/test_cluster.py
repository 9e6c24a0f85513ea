"""Node types and what runs on them: three of them on this machine, and what Ray's autoscaler would start where one is missing."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.data import DataContext

from jobs.distill import distill
from jobs.settle import Choices
from pipeline.rounds.running.in_tasks import quiet_ray_data

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def told(s3, tmp_path_factory):
    """What happened on a cluster whose nodes share nothing but an object store."""
    path = tmp_path_factory.mktemp("cluster") / "told.json"
    command = [sys.executable, str(ROOT / "tests" / "three_nodes.py"), "s3://runs/three", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(path.read_text())


def launches(requests, unavailable=()):
    """Nodes by type that Ray's scheduler would start for a demand, given the node types of cluster.yaml.

    unavailable: types whose launch has just failed.
    """
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    types = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=0,
            max_worker_nodes=kind.get("max_workers", 0),
            resources=kind["resources"],
            labels=kind["labels"],
            priority=kind.get("priority", 0),
        )
        for name, kind in cluster["available_node_types"].items()
    }
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=cluster["max_workers"],
        resource_requests=requests,
        recoverable_resource_availabilities=dict.fromkeys(unavailable, 0.0),
    )
    reply = ResourceDemandScheduler().schedule(request)
    return Counter({launch.instance_type: launch.count for launch in reply.to_launch}), reply.infeasible_resource_requests


pytestmark = pytest.mark.timeout(900)


@pytest.mark.chaos
def test_engines_run_on_rollout_nodes_and_ranks_on_train_nodes_only(told):
    assert set(told["where"]["EngineActor"]) <= {"rollout", "rollout added"}
    assert told["where"]["rank"] == ["train"]
    assert told["where"]["data"] == ["head"]
    assert told["where"]["Dispatcher"] == ["head"]  # with the driver: a spot machine takes no other's engines along


@pytest.mark.chaos
def test_a_rollout_node_that_is_added_during_a_run_is_used(told):
    assert told["rows"]["rollout"] > 0
    assert told["rows"]["rollout added"] > 0


@pytest.mark.chaos
def test_a_run_begins_on_a_cluster_whose_rollout_nodes_are_still_to_be_started(told):
    requests = [ResourceRequestByCount.FromString(bytes.fromhex(text)) for text in told["fresh"]]
    assert launches(requests)[0] == {"rollout": 1}


@pytest.mark.chaos
def test_an_engine_without_a_machine_makes_the_autoscaler_start_a_rollout_node_and_nothing_else(told):
    requests = [ResourceRequestByCount.FromString(bytes.fromhex(text)) for text in told["demand"]]
    engines = [r for r in requests if dict(r.request.resources_bundle) == {"CPU": 1.0, "rollout": 1.0}]
    assert [r.count for r in engines] == [1]
    assert launches(engines) == ({"rollout": 1}, [])
    assert launches(requests)[0] == {"rollout": 1}  # whatever data tasks wait beside it
    assert launches([]) == ({}, [])


def test_a_data_task_that_waits_starts_no_node_for_engines_or_ranks():
    quiet_ray_data()
    assert DataContext.get_current().execution_options.label_selector == {"egrsd-role": "!in(rollout,train)"}
    elsewhere = [("egrsd-role", LabelSelectorOperator.LABEL_OPERATOR_NOT_IN, ["rollout", "train"])]
    plain, ours = (ResourceRequestUtil.make({"CPU": 1}, label_selectors=selectors) for selectors in (None, [elsewhere]))
    assert launches([ResourceRequestByCount(request=plain, count=1)])[0]  # without the selector it would
    assert launches([ResourceRequestByCount(request=ours, count=1)])[0] == {}


def test_rollout_nodes_are_spot_machines_while_there_are_some():
    engine = ResourceRequestUtil.make({"CPU": 1, "rollout": 1})
    two_nodes, full = (ResourceRequestByCount(request=engine, count=count) for count in (9, 200))
    assert launches([two_nodes]) == ({"rollout": 2}, [])
    assert launches([two_nodes], ["rollout"]) == ({"rollout_on_demand": 2}, [])
    assert launches([full]) == ({"rollout": 16, "rollout_on_demand": 9}, [])


@pytest.mark.chaos
def test_versions_that_differ_are_both_named(told):
    assert "the cluster has Ray 2.1.0 and Python 3.9.1, this driver Ray " in told["mismatch"]
    assert "Use the cluster's versions here" in told["mismatch"]


@pytest.mark.parametrize("verb", ["distill", "stage", "train", "evaluate", "compare"])
@pytest.mark.chaos
def test_every_working_verb_names_a_node_that_does_not_see_the_run(told, verb):
    said = told["unreached"][verb]
    assert "does not see this run (cannot read" in said
    assert "every node the AWS_... settings" in said


def test_more_gpus_than_the_cluster_can_ever_have(ray_local, tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        distill(str(tmp_path / "run"), Choices("demo", ["engines.rollout.placement.gpus=4", "engines.rollout.tensor_parallel=4"]))
    assert ended.value.code == 2
    assert "error: engines.rollout.placement: one asks for 1 CPU, 4 GPU; the largest node has" in "".join(capfd.readouterr())


def test_an_address_that_does_not_answer(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # a driver's process has no Ray yet
    with pytest.raises(SystemExit) as ended:
        distill(str(tmp_path / "run"), Choices("demo"), "127.0.0.1:1")
    assert ended.value.code == 2
    assert "error: 127.0.0.1:1: no Ray cluster answers" in "".join(capfd.readouterr())
