"""The facts of a cluster's nodes, and whether a run finds its place there."""

import os
import platform
import time

import pytest

from actors import cluster
from actors.cluster import gather_nodes, judge_room
from pipeline import notices, recipes
from pipeline.errors import ResourceError
from pipeline.fit.machine import judge, judge_nodes, requirements
from pipeline.overrides import resolve


def test_every_node_is_asked_by_a_task_of_its_own(ray_local):
    nodes = gather_nodes()
    [(name, facts)] = nodes.items()
    assert facts.python == platform.python_version()
    assert facts.versions["ray"] == ray_local.__version__
    problems = [line for line in judge(facts, requirements()) if line.level != "ok"]  # those of the machine that tests
    lines = judge_nodes(nodes, requirements())
    assert [line.topic for line in lines] == [f"node {name}"] * max(1, len(problems))
    assert [line.level for line in lines] == ([line.level for line in problems] or ["ok"])


def test_gpus_that_are_not_here():
    with pytest.raises(ResourceError, match="GPU"):
        judge_room(recipes.qwen3_8b(), 0, joined=False)
    assert judge_room(recipes.demo(), 0, joined=False).level == "ok"


def waiting_for(path):
    """The work of a task that ends once a file is there."""

    def wait(*_):
        while not os.path.exists(path):
            time.sleep(0.05)
        return "there"

    return wait


@pytest.fixture
def alive(ray_local):
    return [node for node in ray_local.nodes() if node["Alive"]]


def test_nodes_that_answer_are_not_told_of(alive):
    said = []
    with notices.shown(said.append):
        [(_, node)] = cluster._answered(cluster._on_each(alive, lambda: 1), "who it is")
    assert (node, said) == (alive[0], [])


def test_a_node_that_takes_long_is_named_and_waited_for(alive, ray_local, monkeypatch, tmp_path):
    said, go = [], tmp_path / "go"

    def tell(kind, text):
        said.append((kind, text))
        go.touch()

    monkeypatch.setattr(cluster, "NOTICE_S", 0.3)
    monkeypatch.setattr(cluster, "tell", tell)
    [(ref, _)] = cluster._answered(cluster._on_each(alive, waiting_for(str(go))), "how it is")
    assert ray_local.get(ref) == "there"
    assert said == [("nodes", f"waiting for node {alive[0]['NodeManagerAddress']} to say how it is: for 0.3 s so far.")]


def test_a_node_that_never_answers_is_left_with_a_word_and_doctor_says_so(alive, monkeypatch, tmp_path):
    said, go = [], tmp_path / "go"
    monkeypatch.setattr(cluster, "NOTICE_S", 0.3)
    monkeypatch.setattr(cluster, "PROBE_S", 0.6)
    monkeypatch.setattr(cluster, "tell", lambda *told: said.append(told))
    monkeypatch.setattr(cluster.machine, "gather", waiting_for(str(go)))
    [text] = gather_nodes().values()
    go.touch()
    assert text == "gave no answer in 0.6 s. Check that the node is alive"
    assert [kind for kind, _ in said] == ["nodes", "silent nodes"]
    assert said[1][1] == (
        f"node {alive[0]['NodeManagerAddress']} did not say what it has in 0.6 s, and is not waited for any more."
    )


def test_the_check_of_entropies_runs_in_a_process_of_a_node_and_tells_which(ray_local, tmp_path):
    """A folder that holds no model ends the check before an engine starts, which takes long."""
    run = resolve(recipes.demo(), [f"model.path={tmp_path}"])
    line = cluster.entropy_there(run)
    assert (line.level, line.topic) == ("error", "exact entropy")
    assert line.text.startswith(f"node {ray_local.util.get_node_ip_address()}: {tmp_path}: no model here")


def test_without_a_gpu_to_have_the_check_is_a_warning_at_once(ray_local):
    line = cluster.entropy_there(resolve(recipes.demo(), ["engines.rollout.placement.gpus=1"]))
    assert line.level == "warning"
    assert line.text.startswith(
        "not checked: no node can start an engine now (one asks for 1 CPU, 1 GPU; the largest node has 8 CPU"
    )


def test_a_node_that_starts_no_engine_in_time_is_a_warning(ray_local, monkeypatch):
    monkeypatch.setattr(cluster, "_entropy_here", waiting_for("/no/such/file"))
    line = cluster.entropy_there(resolve(recipes.demo(), ["engines.rollout.start_timeout_s=0.5"]))
    assert (line.level, line.text) == ("warning", "not checked: no engine was up within start_timeout_s 0.5")


@pytest.mark.chaos
@pytest.mark.engine
def test_the_check_of_entropies_starts_a_real_engine_on_its_node(ray_local):
    [node] = [node["NodeManagerAddress"] for node in ray_local.nodes() if node["Alive"]]
    line = cluster.entropy_there(recipes.demo())
    assert (line.level, line.topic) == ("ok", "exact entropy"), line.text
    assert line.text.startswith("exact, by the self-check of vllm ")
    assert line.text.endswith(f", on node {node}")
