"""An import stands in a function only where it loads a dear package that its module does not have anyway."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from jobs.screen.envelope import HEAVY

ROOT = Path(__file__).parent.parent
# Processor seconds of an import by itself, measured where the empty process takes .02: ray .5, torch 1.7, vllm 4.4,
# transformers 3 with a class of it, datasets 1, scipy.special .4, reasoning_gym 1.2, sympy .4, numpy .15, pyarrow .2.
DEAR = {
    "datasets",
    "mlflow",
    "numpy",
    "pyarrow",
    "ray",
    "reasoning_gym",
    "scipy",
    "sympy",
    "torch",
    "transformers",
    "vllm",
    "wandb",
}
CHEAP = {
    "huggingface_hub": "its errors take .25 s, and most verbs open no model",
    "fsspec": "only for the URIs that pyarrow.fs cannot open",
    "jinja2": "comes with transformers, in the process that renders",
    "psutil": "the process that outlives a command starts in .1 s without it",
    "pydantic": "the classes of all settings take .3 s, and --help reads none",
    "rich": "the process that outlives a command prints two lines with it, or none",
    "safetensors": "safetensors.torch imports torch",
    "tokenizers": "comes with transformers",
}
LIGHT = {"numpy", "pyarrow"}  # every verb needs them, and --help does not


def modules() -> dict[str, Path]:
    """Product modules by name, with their files."""
    found = {}
    for room in ("pipeline", "actors", "jobs"):
        for file in (ROOT / room).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules()


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


def targets(node: ast.AST) -> list[str]:
    """Modules that an import statement loads."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        full = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else str(node.module) for name in full]
    return []


@cache
def packages(name: str) -> frozenset[str]:
    """Packages from elsewhere that are loaded with a module, directly or not."""
    seen: set[str] = set()
    found, left = set(), [name]
    while left:
        if (here := left.pop()) in seen:
            continue
        seen.add(here)
        if here not in MODULES:
            found.add(here.partition(".")[0])
            continue
        left += [".".join(here.split(".")[:n]) for n in range(1, here.count(".") + 1)]
        left += [target for node in tree(here).body for target in targets(node)]
    return frozenset(found - set(sys.stdlib_module_names))


def local_imports() -> Iterator[tuple[str, int, set[str]]]:
    """Module, line, and packages that the import of a function adds to those of its module."""
    for name in MODULES:
        for function in ast.walk(tree(name)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    if named := targets(node):
                        yield name, node.lineno, set().union(*map(packages, named)) - packages(name)


def test_every_import_in_a_function_spares_a_dear_package():
    idle = {f"{name}:{line}" for name, line, added in local_imports() if not added & (DEAR | set(CHEAP))}
    used = set().union(*(added for *_, added in local_imports()))
    assert not idle, f"these imports can stand at the top of their modules: {sorted(idle)}"
    assert set(CHEAP) <= used
    assert used >= DEAR


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("jobs")))
def test_a_verb_loads_no_dear_package_before_its_settings_are_checked(name):
    """Ray also reads variables of the environment at its import, which a session sets."""
    computing = {"jobs.audit", "jobs.sweep", "jobs.model_folder"}  # each is imported where its verb begins to compute
    assert not packages(name) & (DEAR - LIGHT) or name in computing


@pytest.mark.parametrize("name", ["status", "ls", "report", "export", "verify", "explain", "init", "recipes", "cli"])
def test_a_verb_that_reads_runs_loads_nothing_that_a_light_installation_lacks(name):
    """tests/test_wheel.py runs such an installation, which takes a minute. Here the module at fault is found at once."""
    assert not packages(f"jobs.{name}") & set(HEAVY)
