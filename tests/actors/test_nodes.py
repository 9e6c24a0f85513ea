"""The facts of a cluster's nodes, and whether a run finds its place there."""

import platform

import pytest

from actors.cluster import gather_nodes, judge_room
from pipeline import recipes
from pipeline.errors import ResourceError
from pipeline.fit.machine import judge_nodes, requirements


def test_every_node_is_asked_by_a_task_of_its_own(ray_local):
    nodes = gather_nodes()
    [(name, facts)] = nodes.items()
    assert facts.python == platform.python_version()
    assert facts.versions["ray"] == ray_local.__version__
    assert {line.topic for line in judge_nodes(nodes, requirements())} == {f"node {name}"}


def test_gpus_that_are_not_here():
    with pytest.raises(ResourceError, match="GPU"):
        judge_room(recipes.qwen3_8b(), 0, joined=False)
    assert judge_room(recipes.demo(), 0, joined=False).level == "ok"
