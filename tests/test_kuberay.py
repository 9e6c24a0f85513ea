"""kuberay.yaml offers what cluster.yaml offers, read as Ray's own autoscaler reads it, at the versions of the lock."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as autoscaler_reads

from actors.resources import Demand, Node, check
from pipeline import recipes
from pipeline.errors import ResourceError

ROOT = Path(__file__).parent.parent
RESOURCE = yaml.safe_load((ROOT / "kuberay.yaml").read_text())
SPEC = RESOURCE["spec"]


@pytest.fixture(scope="module")
def read():
    """What Ray's autoscaler makes of the file; `metadata.namespace` comes from Kubernetes."""
    return autoscaler_reads({**RESOURCE, "metadata": {**RESOURCE["metadata"], "namespace": "default"}})


def nodes(read, *, without=""):
    """Every node that the cluster may grow to."""
    return [
        Node(kind["resources"], kind["labels"])
        for name, kind in read["available_node_types"].items()
        for _ in range(1 if name == read["head_node_type"] else kind["max_workers"])
        if name != without
    ]


def test_it_is_an_autoscaling_cluster_with_token_authentication():
    assert (RESOURCE["apiVersion"], RESOURCE["kind"]) == ("ray.io/v1", "RayCluster")
    assert SPEC["enableInTreeAutoscaling"] is True
    assert SPEC["authOptions"] == {"mode": "token"}


def test_rays_autoscaler_reads_the_node_types_of_cluster_yaml(read):
    jsonschema.validate(read, json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text()))
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    types = {("head" if name == read["head_node_type"] else name): kind for name, kind in read["available_node_types"].items()}
    expected_types = {name: kind for name, kind in cluster["available_node_types"].items() if name != "rollout_on_demand"}
    assert types.keys() == expected_types.keys()  # on Kubernetes the operator of the node pools chooses between prices
    for name, expected in expected_types.items():
        assert types[name]["labels"] == expected["labels"]
        assert {key: types[name]["resources"].get(key) for key in expected["resources"]} == expected["resources"]
        assert types[name]["min_workers"] == expected.get("min_workers", 0)
        assert types[name]["max_workers"] == expected.get("max_workers", 0)
    assert read["idle_timeout_minutes"] == cluster["idle_timeout_minutes"]


def test_no_group_starts_outside_its_bounds():
    for group in SPEC["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", ["qwen3_4b", "qwen3_8b"])
def test_the_recipes_fit_and_only_with_every_role(read, name):
    run = recipes.recipe(name)
    engines = Demand("engines.rollout", run.engines.rollout.max, run.engines.rollout.placement)
    demands = [engines, Demand("train", run.train.workers, run.train.placement)]
    check(demands, nodes(read))
    for role in ("rollout", "train"):
        with pytest.raises(ResourceError, match="engines.rollout" if role == "rollout" else "train"):
            check(demands, nodes(read, without=role))


def test_its_versions_are_those_of_the_lock():
    locked = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [SPEC["headGroupSpec"], *SPEC["workerGroupSpecs"]]
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert SPEC["rayVersion"] == locked["ray"]
    assert images == {f"{project['name']}:{project['version']}-ray{locked['ray']}-py311"}
    assert f"rayproject/ray:{locked['ray']}-py311-gpu" in (ROOT / "kuberay.yaml").read_text()


def test_the_image_can_be_built_by_its_own_user():
    """pip builds inside the folder, and the image's user is ray: files of COPY are root's without --chown."""
    text = (ROOT / "kuberay.yaml").read_text()
    copied = re.findall(r"#   COPY --chown=ray:users (.*) /home/ray/egrsd(/?\w*)\n", text)
    assert copied == [("pyproject.toml README.md LICENSE", "/"), *((room, f"/{room}") for room in ("pipeline", "actors", "jobs"))]
    assert '#   RUN pip install "/home/ray/egrsd[gpu,gym]"\n' in text


COMMANDS = [
    command
    for key, commands in yaml.safe_load((ROOT / "cluster.yaml").read_text()).items()
    if key.endswith("_commands")
    for command in commands
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_cluster_yaml_reaches_the_shell_whole(command):
    """YAML takes ` #` in a plain text for a comment, and then the shell gets half of a command."""
    assert subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=True).stderr == ""


def test_a_node_that_is_set_up_twice_has_its_environment_once(tmp_path):
    [command] = [command for command in COMMANDS if ".bashrc" in command]
    (tmp_path / ".bashrc").write_text("# mine\n")
    for _ in range(2):
        subprocess.run(["bash", "-c", command], env={**os.environ, "HOME": str(tmp_path)}, check=True)
    assert (tmp_path / ".bashrc").read_text().count("RAY_AUTH_MODE=token") == 1
