"""The files of a LoRA adapter, and a check that an adapter belongs to a run. Trainer and engines both use it. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import Model
from pipeline.errors import ModelError
from pipeline.store.folders import ADAPTER_CONFIG

REMEDY = "Use an adapter that this run's trainer published, with the settings the run was started with"


def check(folder: Path, model: Model, where: str) -> None:
    """Raise ModelError, with `where` and what differs, unless the adapter in a local folder has the run's settings.

    The check compares rank, alpha and targets, and the base model when the adapter names one.
    """
    try:
        saved = json.loads((folder / ADAPTER_CONFIG).read_text())
    except FileNotFoundError:
        raise ModelError(f"no adapter here: {ADAPTER_CONFIG} is missing", where, REMEDY) from None
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{ADAPTER_CONFIG} is not JSON ({error})", where, "Publish the adapter again") from None
    if not isinstance(saved, dict):
        raise ModelError(f"{ADAPTER_CONFIG} is no object of settings", where, REMEDY)
    if isinstance(saved.get("target_modules"), list) and all(
        isinstance(name, str) for name in saved["target_modules"]
    ):  # peft keeps a set
        saved["target_modules"] = sorted(saved["target_modules"])
    expected = {"r": model.lora_rank, "lora_alpha": model.lora_alpha, "target_modules": sorted(model.lora_targets)}
    for name, value in expected.items():
        if saved.get(name) != value:
            raise ModelError(f"the adapter's {name} is {saved.get(name)}, the run asks for {value}", where, REMEDY)
    base = saved.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ModelError(f"{ADAPTER_CONFIG}: base_model_name_or_path is no text", where, REMEDY)
    if base and _folder_name(base) != _folder_name(model.path):
        raise ModelError(f"the adapter was trained on '{base}', the run's model is '{model.path}'", where, REMEDY)


def _folder_name(model: str) -> str:
    """The last part of a model's path, by which two paths are compared: nodes keep the same model in different folders."""
    return Path(model).name.replace("_", "-")
