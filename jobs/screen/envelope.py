"""What `--json` prints: one JSON document of the same form for every verb, on standard output (README: scripts).

The command line notes here what was asked of it. Nothing heavy is imported, so the keeper can write a document too.
"""

from __future__ import annotations

import json
import math
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

FORMAT = 1  # of the document: it grows by one when a key changes its meaning or goes
# what a light install lacks
HEAVY = ("ray", "torch", "vllm", "transformers", "peft", "datasets", "safetensors", "tokenizers", "huggingface_hub")


@dataclass(frozen=True)
class Asked:
    """What the command line was asked: the verb, whether JSON is wanted, and the address of a cluster."""

    verb: str = ""
    json: bool = False
    address: str | None = None


asked: ContextVar[Asked] = ContextVar("asked", default=Asked())  # noqa: B039 (it is frozen)


@dataclass
class Told:
    """What a verb has told so far: its result, the lines of text, and the error that ended it."""

    result: Any = None
    messages: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None
    log: str | None = None


def document(told: Told, code: int) -> str:
    """The JSON document of a verb that ends with an exit code. Numbers that JSON cannot hold become null."""
    parts = {
        "format": FORMAT,
        "verb": asked.get().verb,
        "exit_code": code,
        "result": finite(told.result),
        "messages": told.messages,
        "error": told.error,
        "log": told.log,
    }
    return json.dumps(parts, indent=1, allow_nan=False, default=str)


def error_of(kind: str, what: str, where: str = "", remedy: str = "") -> dict[str, str]:
    """The error of a document: the name of its class, what is wrong, where, and what to do."""
    return {"kind": kind, "what": what, "where": where, "remedy": remedy}


def finite(value: Any) -> Any:
    """Plain data with null in the place of NaN and infinite numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


def lacking(error: BaseException) -> str | None:
    """The sentence about a package that a light installation lacks. None for another error."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name not in HEAVY and name not in {"aiohttp", "requests", "math_verify", "reasoning_gym", "scipy", "regex", "sympy"}:
        return None
    verb = f"`egrsd {asked.get().verb}`" if asked.get().verb else "this command"
    return f"{verb} needs the package {name}, which is not installed here. Install all of it: pip install 'egrsd[cpu]', or [gpu]"
