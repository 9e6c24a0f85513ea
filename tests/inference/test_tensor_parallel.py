"""An engine of two processes, each with half of every layer. Users have it on GPUs; vLLM runs it on a CPU too."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from two_processes import POOL, REQUESTS, SAMPLING, workers

from actors.pool.pool import EnginePool
from pipeline import config
from pipeline.contract import Policy

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
ROOT = Path(__file__).parent.parent.parent


def told(script, path, *arguments):
    """The JSON document that a script of this folder writes in a process of its own."""
    command = [sys.executable, str(ROOT / "tests/inference" / script), *arguments, str(path)]
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    ended = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def two(vllm_forks, adapters, tmp_path_factory):
    """What an engine of two processes answered under two policies, base and adapter."""
    path = tmp_path_factory.mktemp("two") / "told.json"
    ended = vllm_forks.script(Path(__file__).with_name("two_processes.py"), adapters[0], str(path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def one(engine, adapters):
    """The ids that an engine of one process writes under the same policies."""
    parts = [engine.generate(REQUESTS, policy, SAMPLING) for policy in (Policy(0), Policy(1, adapters[0]))]
    return [[trace.tokens.tolist() for trace in part] for part in parts]


def ids(parts):
    return [[tokens for tokens, *_ in part] for part in parts]


def test_traces_are_those_of_one_process_also_when_base_and_adapter_share_a_batch(two, one):
    """Each process loads the kernels for LoRA by itself: vLLM's own answer the base's requests with the adapter here."""
    assert ids(two["traces"]) == one
    assert ids(two["beside"]) == one


def test_numbers_of_both_processes_are_exact(two, plain_forward, engine):
    assert two["facts"] == vars(engine.facts())
    for version in (0, 1):
        for kind in ("traces", "scores"):
            for (tokens, *got), request in zip(two[kind][version], REQUESTS, strict=True):
                np.testing.assert_allclose(got, plain_forward(version, request.prompt, tokens), atol=1e-4)


def test_a_killed_process_breaks_the_engine_with_its_own_error(two):
    assert two["processes"] == 2
    assert len(two["errors"]) == 2
    assert all("tiny_reasoner: the engine broke: " in error for error in two["errors"])


@pytest.mark.chaos
def test_a_pool_replaces_an_engine_whose_process_was_killed(ray_local, one, adapters):
    """The batch that it held is asked again, and no row is lost."""
    pool = EnginePool.start("rollout", config.Model(), POOL, config.ScoreSettings(fallback=False))
    assert pool.facts().entropy_method == "exact"
    [first] = pool.overview().engines
    os.kill(workers(first.pid).pop(), signal.SIGKILL)
    traces = pool.generate(REQUESTS, Policy(1, adapters[0]), SAMPLING)
    assert [trace.tokens.tolist() for trace in traces] == one[1]
    assert [name for name, *_ in pool.overview().gone] == [first.name]
    pool.close()


@pytest.mark.chaos
def test_engines_and_ranks_of_the_recipe_for_one_machine_have_a_card_each(tmp_path):
    engines, ranks = told("gpu_nodes.py", tmp_path / "told.json", "eight")
    assert sorted(engines + ranks) == [str(card) for card in range(8)]
    assert (len(engines), len(ranks)) == (4, 4)


def test_the_gpus_of_an_engine_are_on_one_node_and_one_card_holds_engine_and_rank(tmp_path):
    seen = told("gpu_nodes.py", tmp_path / "told.json")
    assert "one asks for 0.1 CPU, 2 GPU; the largest node has" in seen["refused"]
    assert seen["engine"] == "double 0,1"
    assert seen["free"] == 2.0
    assert seen["shared"] == ["0", "0", 0.0, 1]
