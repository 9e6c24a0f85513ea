"""From what `model.path` says to what `from_pretrained` opens."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

MODEL_NAME = "tiny-reasoner"


def asset_path() -> Path:
    """The folder of the shipped tiny reasoner: weights, configuration, tokenizer."""
    return Path(str(files("pipeline") / "models" / "tiny_reasoner"))


def resolve_model(path: str) -> str:
    """`path`, or the shipped folder when it is the name of the tiny reasoner."""
    return str(asset_path()) if path == MODEL_NAME else path
