"""The files of a LoRA adapter, and whether an adapter belongs to a run. Trainer and engines both ask here. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import Model
from pipeline.errors import ModelError

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
REMEDY = "Use an adapter that this run's trainer published, with the settings the run was started with"


def check(folder: Path, model: Model, where: str) -> None:
    """Raise ModelError, naming `where` and what differs, unless the adapter in a local folder has the run's settings.

    Compared: rank, alpha, targets, and the base where the adapter names one.
    """
    try:
        found = json.loads((folder / ADAPTER_CONFIG).read_text())
    except FileNotFoundError:
        raise ModelError(f"no adapter here: {ADAPTER_CONFIG} is missing", where, REMEDY) from None
    except ValueError as error:
        raise ModelError(f"{ADAPTER_CONFIG} is not JSON ({error})", where, "Publish the adapter again") from None
    if isinstance(found.get("target_modules"), list):  # peft keeps a set
        found["target_modules"] = sorted(found["target_modules"])
    asked = {"r": model.lora_rank, "lora_alpha": model.lora_alpha, "target_modules": sorted(model.lora_targets)}
    for name, value in asked.items():
        if found.get(name) != value:
            raise ModelError(f"the adapter's {name} is {found.get(name)}, the run asks for {value}", where, REMEDY)
    base = found.get("base_model_name_or_path")
    if base and _folder_name(base) != _folder_name(model.path):
        raise ModelError(f"the adapter was trained on '{base}', the run's model is '{model.path}'", where, REMEDY)


def _folder_name(model: str) -> str:
    """What two names of one model share: nodes keep models at different places."""
    return Path(model).name.replace("_", "-")
