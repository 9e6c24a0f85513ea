"""What vLLM's sources say of an architecture, read without importing vLLM, which takes ten seconds."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "vllm.model_executor.models."


def has_class(architecture: str) -> bool | None:
    """Whether vLLM has a class of its own for this architecture. None where vLLM or its registry is not here."""
    known = _registered(models) if (models := _models()) is not None else {}
    return architecture in known if known else None


def serves_lora(architecture: str) -> bool | None:
    """Whether vLLM's class of this architecture takes adapters. None where its sources do not tell, or vLLM is not here."""
    models = _models()
    entry = None if models is None else _registered(models).get(architecture)
    return None if models is None or entry is None else _takes(models, *entry)


def _models() -> Path | None:
    """The folder of vLLM's models, where vLLM is here."""
    found = find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0], "model_executor", "models")


@cache
def _registered(models: Path) -> dict[str, tuple[str, str]]:
    """Module and class of each architecture in vLLM's registry."""
    tree = _parsed(models, "registry")
    if tree is None:
        return {}
    found = {}
    for pairs in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
        for key, value in zip(pairs.keys, pairs.values, strict=True):
            match key, value:
                case ast.Constant(str(name)), ast.Tuple(elts=[ast.Constant(str(module)), ast.Constant(str(kind))]):
                    found[name] = module, kind
    return found


def _takes(models: Path, module: str, name: str) -> bool | None:
    """Whether a class of a module is, or descends from, one that takes adapters."""
    tree = _parsed(models, module)
    if tree is None:
        return None
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    if name in classes:
        bases = [ast.unparse(base) for base in classes[name].bases]
        found = [base == "SupportsLoRA" or (base not in ("nn.Module", "ABC") and _takes(models, module, base)) for base in bases]
        return True if True in found else None if None in found else False
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
        if named := [alias.name for alias in node.names if name in (alias.asname, alias.name)]:
            said = (node.module or "").removeprefix(PACKAGE)
            if said in ("interfaces", "interfaces_base"):
                return False  # another ability, such as SupportsPP
            return _takes(models, said, named[0]) if node.level == 1 or said != node.module else None
    return None  # made by a call, or named in a way that is not known here


@cache
def _parsed(models: Path, module: str) -> ast.Module | None:
    try:
        return ast.parse((models / f"{module}.py").read_text())
    except (OSError, SyntaxError, ValueError):
        return None
