"""Every shipped recipe loads, validates, prints, and finds its nodes in cluster.yaml."""

import json
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from actors import resources
from pipeline import recipes
from pipeline.errors import SettingError
from pipeline.overrides import load
from pipeline.recipes import called

ROOT = Path(__file__).parent.parent
NAMES = sorted(recipes.descriptions())


def test_the_recipes_are_the_promised_ones():
    assert NAMES == ["demo", "gemma3_270m", "qwen3_1_7b_1gpu", "qwen3_4b", "qwen3_4b_8gpu", "qwen3_8b", "smollm2"]


@pytest.mark.parametrize("name", NAMES)
def test_engines_on_gpus_have_time_to_download_and_compile(name):
    pool = recipes.recipe(name).engines.rollout
    assert pool.start_timeout_s == (1800 if pool.placement.gpus else 600)


@pytest.mark.parametrize("name", NAMES)
def test_bounds_may_take_the_place_of_exact_entropies_where_a_recipe_may_run_anywhere(name):
    run = recipes.recipe(name)
    assert (run.score.entropy, run.score.fallback) == ("exact", run.engines.rollout.placement.gpus == 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_prints_as_yaml_that_loads_to_itself(name):
    run = recipes.recipe(name)
    assert run.name == name
    assert load(yaml.safe_load(run.to_yaml())) == run


@pytest.mark.parametrize(("name", "gamma", "window"), [("qwen3_4b", 0.3, 3), ("qwen3_4b_8gpu", 0.3, 3), ("qwen3_8b", 1.0, 5)])
def test_the_paper_recipes_have_the_papers_settings(name, gamma, window):
    run = recipes.recipe(name)
    assert (run.objective.name, run.objective.gamma, run.objective.window) == ("cl_egrsd", gamma, window)
    assert (run.label.gamma, run.profile.window) == (gamma, window)
    train, rollout = run.train, run.rollout
    assert (train.learning_rate, train.betas, train.grad_clip, train.batch_traces) == (5e-6, (0.9, 0.999), 0.1, 32)
    assert (run.rounds, train.workers, train.dtype) == (100, 4 if name.endswith("_8gpu") else 8, "bfloat16")
    assert (run.model.lora_rank, run.model.lora_alpha, run.model.lora_dropout) == (64, 128, 0)
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens, rollout.group_size) == (
        1.1,
        0.95,
        20,
        1024,
        1,
    )
    assert run.grade.advantage == "running"


def test_an_unknown_recipe_is_met_with_the_near_one():
    with pytest.raises(SettingError, match="Did you mean 'qwen3_4b'"):
        recipes.recipe("qwen3-4b")


def test_the_cluster_file_fits_rays_schema_and_the_recipes():
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    types = cluster["available_node_types"]
    assert set(types) == {"head", "rollout", "rollout_on_demand", "train"}
    for name in ("rollout", "rollout_on_demand"):
        assert types[name]["min_workers"] == 0 < types[name]["max_workers"]
    assert cluster["max_workers"] == sum(kind.get("max_workers", 0) for kind in types.values())
    nodes = [resources.Node(dict(t["resources"])) for t in types.values() for _ in range(t.get("max_workers", 1))]
    for name in ("qwen3_4b", "qwen3_8b"):
        run = recipes.recipe(name)
        rollout, train = run.engines.rollout, run.train
        demands = [
            resources.Demand("engines.rollout", rollout.max, rollout.placement),
            resources.Demand("train", train.workers, train.placement),
        ]
        resources.check(demands, nodes)
        for demand, home in zip(demands, ("rollout", "train"), strict=True):
            fitting = [t.removesuffix("_on_demand") for t, spec in types.items() if fits(demand, spec)]
            assert set(fitting) == {home}


def test_every_node_of_the_cluster_file_can_read_the_run_and_has_python_and_a_driver():
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    nodes = [kind["node_config"] for kind in cluster["available_node_types"].values()]
    assert len({node["ImageId"] for node in nodes}) == 1  # Ray's own default is an Ubuntu 18.04
    assert nodes[0]["ImageId"].startswith(
        "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/"
    )
    assert all(node["IamInstanceProfile"] and node["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 200 for node in nodes)
    starts = [cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]]
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert cluster["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("python3.12 -m venv" in command for command in cluster["setup_commands"])


def fits(demand, spec):
    return all(spec["resources"].get(name, 0) >= amount for name, amount in demand.resources.items())


def test_a_run_of_somebodys_own_file_is_not_called_a_recipe():
    assert called(recipes.demo()) == "recipe demo"
    assert called(recipes.demo().model_copy(update={"name": "mine"})) == "the settings 'mine'"
