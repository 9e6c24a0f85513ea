"""LoRA adapters as an engine meets them: fetched from wherever the policy lies, and checked before vLLM sees them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from pipeline import config
from pipeline.errors import ModelError, StoreError
from pipeline.store.files import Files
from pipeline.store.folders import MANIFEST, POLICY_REMEDY, fetch_folder
from pipeline.training import adapter
from pipeline.training.adapter import ADAPTER

_KEPT = 32  # policies of a run on one machine: more than engines hold at once


def fetch(uri: str) -> tuple[str, str]:
    """(local folder, hash of the content) of the adapter at `uri`: the folder itself when local, else a checked copy.

    A policy that is published again has another hash, and on this machine its copy replaces the one before; of a run's copies the
    last _KEPT that were asked for stay. Raises StoreError when a remote policy has no manifest, or a file is not the one its
    manifest names.
    """
    if "://" not in uri or uri.startswith("file://"):
        folder = uri.removeprefix("file://")
        return folder, _local_version(Path(folder))
    parent, _, name = uri.rstrip("/").rpartition("/")
    files = Files(parent)
    version = _version(files, name)
    copies = Path(tempfile.gettempdir()) / "egrsd-adapters" / _digest(parent.encode())
    target = copies / f"{name}-{version}"
    if not target.exists():
        _copy(files, name, target)
    with contextlib.suppress(OSError):
        os.utime(target, ns=(time.time_ns(), time.time_ns()))  # the clock of files is coarse
    return str(target), version


def check(folder: str, uri: str, model: config.Model, hidden_size: int) -> None:
    """Raise ModelError, naming `uri` and what differs, unless the adapter in `folder` fits the model of this run.

    Settings come from adapter_config.json; the width of the weights from the header of the safetensors file.
    """
    adapter.check(Path(folder), model, uri)
    width = _input_width(Path(folder) / ADAPTER, uri)
    if width not in (None, hidden_size):
        raise ModelError(f"the adapter's layers are {width} wide, the model's {hidden_size}", uri, adapter.REMEDY)


def _input_width(weights: Path, uri: str) -> int | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "np") as file:
            name = next((key for key in file.keys() if key.endswith("q_proj.lora_A.weight")), None)  # noqa: SIM118
            return file.get_slice(name).get_shape()[1] if name else None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{ADAPTER} cannot be read ({error})", uri, "Publish the adapter again") from None


def _local_version(folder: Path) -> str:
    """Of a published policy the hash of its manifest, else of the times and sizes of the adapter's files."""
    manifest = folder / MANIFEST
    if manifest.exists():
        return _digest(manifest.read_bytes())
    stats = [(file.name, file.stat()) for file in sorted(folder.glob("adapter_*"))]
    return _digest(repr([(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]).encode())


def _version(files: Files, name: str) -> str:
    manifest = files.read_bytes(f"{name}/{MANIFEST}")
    if manifest is None:
        raise StoreError(f"no policy is published here: {MANIFEST} is missing", files.locate(name), adapter.REMEDY)
    return _digest(manifest)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def _copy(files: Files, name: str, target: Path) -> None:
    """Put a checked copy of a policy at `target`; drop other versions of the same policy, and policies not asked for lately."""
    copy = fetch_folder(files, name, POLICY_REMEDY)
    if copy is None or target.name != f"{name}-{_version(files, name)}":
        raise StoreError("the policy changed while it was read", files.locate(name), "Run the same command again")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        copy.rename(target)
    except OSError:
        if not target.exists():  # else another engine on this machine was quicker
            raise
        shutil.rmtree(copy)
    others = sorted((path for path in target.parent.iterdir() if path != target), key=_last_used, reverse=True)
    for place, other in enumerate(others):
        if place >= _KEPT - 1 or other.name.rpartition("-")[0] == name:
            shutil.rmtree(other, ignore_errors=True)


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another engine on this machine has just dropped it
        return 0.0
