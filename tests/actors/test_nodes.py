"""The facts of a cluster's nodes, and whether a run finds its place there."""

import platform

import pytest

from actors.cluster import gather_nodes, judge_room
from pipeline import recipes
from pipeline.errors import ResourceError
from pipeline.fit.machine import judge, judge_nodes, requirements


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
