"""LoRA adapters as an engine meets them: fetched from wherever the policy lies, and checked before vLLM sees them."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pyarrow import fs

from pipeline import config
from pipeline.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_REMEDY = "Use an adapter that this run's trainer published"


def fetch(uri: str) -> str:
    """The local folder of the adapter at `uri`: itself when local, else a copy in this machine's cache (once per URI).

    Raises ModelError when nothing is there. A published policy never changes, so a cached copy is never stale.
    """
    if "://" not in uri or uri.startswith("file://"):
        return uri.removeprefix("file://")
    target = Path(tempfile.gettempdir()) / "egrsd-adapters" / hashlib.sha256(uri.encode()).hexdigest()[:24]
    if not target.exists():
        _download(uri, target)
    return str(target)


def check(folder: str, uri: str, model: config.Model, base: str, hidden_size: int) -> None:
    """Raise ModelError, naming `uri` and what differs, unless the adapter in `folder` fits the model of this run.

    Rank and base come from adapter_config.json; the width of the weights from the header of the safetensors file.
    """
    found = _read_config(folder, uri)
    if found.get("r") != model.lora_rank:
        raise ModelError(f"the adapter has rank {found.get('r')}, the run model.lora_rank {model.lora_rank}", uri, _REMEDY)
    named = found.get("base_model_name_or_path")
    if named and not _same_model(named, model.path, base):
        raise ModelError(f"the adapter was trained on '{named}', the run's model is '{model.path}'", uri, _REMEDY)
    width = _input_width(Path(folder) / WEIGHTS, uri)
    if width not in (None, hidden_size):
        raise ModelError(f"the adapter's layers are {width} wide, the model's {hidden_size}", uri, _REMEDY)


def _read_config(folder: str, uri: str) -> dict[str, Any]:
    try:
        return json.loads((Path(folder) / CONFIG).read_text())
    except FileNotFoundError:
        raise ModelError(f"no adapter here: {CONFIG} is missing", uri, _REMEDY) from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{CONFIG} is not JSON ({error})", uri, "Publish the adapter again") from None


def _same_model(named: str, *known: str) -> bool:
    """Whether two names mean one model: equal, or folders of one name (nodes keep models at different places)."""
    return any(named == name or Path(named).name.replace("_", "-") == Path(name).name.replace("_", "-") for name in known)


def _input_width(weights: Path, uri: str) -> int | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "np") as file:
            name = next((key for key in file.keys() if key.endswith("q_proj.lora_A.weight")), None)  # noqa: SIM118
            return file.get_slice(name).get_shape()[1] if name else None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{WEIGHTS} cannot be read ({error})", uri, "Publish the adapter again") from None


def _download(uri: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = tempfile.mkdtemp(dir=target.parent)
    try:
        fs.copy_files(uri, partial)
        Path(partial).rename(target)
    except FileNotFoundError:
        raise ModelError("no adapter here", uri, _REMEDY) from None
    except OSError:
        if not target.exists():  # else another engine on this machine was quicker
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
