"""The locks: what the demo needs comes as wheels, and the lock of reasoning-gym has only what reasoning-gym needs."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
WITHOUT_WHEELS = {"cellpylib", "pycosat", "zss"}  # of their pinned versions there is only source
# vLLM's CPU build asks for the first three, and no text model needs them. The wheel of torchvision does not fit this torch.
# The tracker wandb asks for the last, for evaluations that nothing here makes.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "cwevals"}


def pins(name):
    """Names and versions in a lock."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(package): version for package, version in (line.split("==") for line in lines)}


def needs(package, extras, python):
    """The requirements of an installed package under a version of Python, with those of its extras."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    for text in metadata.requires(package) or ():
        need = Requirement(text)
        if need.marker is None or any(need.marker.evaluate({**environment, "extra": extra}) for extra in extras or {""}):
            yield need


def closure(roots, known, python):
    """Every package of `known` that the requirements `roots` reach, and every name that is not among them."""
    found, missing, asked = set(), set(), [Requirement(text) for text in roots]
    while asked:
        need = asked.pop()
        name = canonicalize_name(need.name)
        if (name, frozenset(need.extras)) in found or name in LEFT_OUT | {"egrsd"}:
            continue
        if name not in known:
            missing.add(name)
            continue
        found.add((name, frozenset(need.extras)))
        asked += needs(name, need.extras, python)
    return {name for name, _ in found}, missing


def roots(*sections):
    """The project's own requirements: its base, and the extras that are named."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(line for name in sections for line in project["optional-dependencies"][name])]


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_lock_holds_all_that_it_needs_and_nothing_that_has_no_wheel(python):
    known = pins("requirements.lock")
    names = ("whole", "cpu", "smollm2", "tensorboard", "wandb", "mlflow", "dev")
    _, missing = closure(roots(*names), known, python)
    assert missing <= {name for name in missing if name.startswith(("nvidia-", "cuda-"))}  # of torch's build for CUDA
    assert not WITHOUT_WHEELS & known.keys()


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_reasoning_gym_has_a_lock_of_its_own(python):
    base, own = pins("requirements.lock"), pins("requirements-gym.lock")
    assert not base.keys() & own.keys()
    reached, missing = closure(roots("gym")[-1:], base | own, python)
    assert not missing
    assert own.keys() <= reached
    assert own.keys() >= WITHOUT_WHEELS
