"""Policies for engines: one is fetched from where it lies, and checked before vLLM loads it.

Copies of remote policies lie in `adapters` of this user's temporary folder, a folder for each run. The engines of a machine share
them, and one process at a time makes a copy: it holds a lock of the operating system.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline import config
from pipeline.digest import short
from pipeline.errors import ModelError, StoreError
from pipeline.live.lease import REACH
from pipeline.store.files import Files
from pipeline.store.folders import ADAPTER, MANIFEST, POLICY_REMEDY, Manifest, digest_of_manifest, fetch_folder, read_manifest
from pipeline.store.owner import OLD_S
from pipeline.store.private import private_folder
from pipeline.training.student import adapter

_KEPT = 32  # copies of a run's policies that stay on a machine; engines hold fewer at once
_COPIES, _PART, _LOCK = "adapters", "part", "lock"


def fetch(uri: str, keep: int = _KEPT) -> tuple[str, str]:
    """(local folder, hash of the content) of the policy at `uri`. A remote policy is copied into a folder of this user alone.

    Every file is compared with the manifest at each use, since vLLM may read it again at any time. A damaged copy is made anew.
    A policy that was published again has another hash, and its new copy replaces the old one. On a cluster a machine keeps the
    `keep` copies of a run that were used last. It keeps none of a run that nobody has used for a day. With a local Ray they go
    with the command.

    Raises StoreError when a policy does not match its manifest, and when a remote one has none. It raises it too when this
    machine does not see a local one, or has no space for a copy.
    """
    if "://" not in uri or uri.startswith("file://"):
        folder = Path(uri.removeprefix("file://"))
        document = read_manifest(Files(str(folder.parent)), folder.name)
        if document is None:
            if not folder.is_dir():
                raise StoreError(f"node {socket.gethostname()} does not see this policy", str(folder), REACH)
            return str(folder), _times(folder)
        if damaged := _damaged(folder, document):
            raise StoreError("the file is missing or damaged", str(folder / damaged), POLICY_REMEDY)
        return str(folder), digest_of_manifest(document)
    parent, _, name = uri.rstrip("/").rpartition("/")
    files = Files(parent)
    document = _manifest(files, name)
    version = digest_of_manifest(document)
    target = private_folder(_COPIES, _digest(parent.encode())) / f"{name}-{version}"
    try:
        if not target.exists():
            with _alone():
                if not target.exists():  # otherwise another engine of this machine has just made it
                    _copy(files, name, target, keep)
        if _damaged(target, document):
            with _alone():
                if _damaged(target, document):
                    shutil.rmtree(target, ignore_errors=True)
                    _copy(files, name, target, keep)
    except OSError as error:
        what = f"node {socket.gethostname()} cannot keep a copy of a policy ({error.strerror or error})"
        raise StoreError(what, str(target), "Free some space there, or give its Ray a TMPDIR with more") from error
    with contextlib.suppress(OSError):
        os.utime(target, ns=(time.time_ns(), time.time_ns()))  # the kernel's own clock for files is too coarse to order two uses
    return str(target), version


def check(folder: str, uri: str, model: config.Model, hidden_size: int) -> None:
    """Raise ModelError unless the adapter in `folder` fits the model of this run; the error names `uri` and the difference.

    The adapter's settings are read from adapter_config.json. The width of its weights is read from the safetensors header.
    """
    adapter.check(Path(folder), model, uri)
    width = _input_width(Path(folder) / ADAPTER, uri)
    if width not in (None, hidden_size):
        raise ModelError(f"the adapter's layers are {width} wide, the model's {hidden_size}", uri, adapter.REMEDY)


def _input_width(weights: Path, uri: str) -> int | None:
    """Input width of the adapter's first query projection; None when it has none. Raises ModelError for a damaged file."""
    try:
        with safe_open(weights, "np") as file:
            name = next((key for key in file.keys() if key.endswith("q_proj.lora_A.weight")), None)  # noqa: SIM118
            return file.get_slice(name).get_shape()[1] if name else None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{ADAPTER} cannot be read ({error})", uri, "Publish the adapter again") from None


def _times(folder: Path) -> str:
    """The hash of the times and sizes of an adapter's files, for a folder that is no published policy."""
    stats = [(file.name, file.stat()) for file in sorted(folder.glob("adapter_*"))]
    return _digest(repr([(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]).encode())


def _damaged(folder: Path, manifest: Manifest) -> str | None:
    """The first file of a folder that is missing or not as its manifest says; None when all are. Links are never followed."""
    for name, sha256 in manifest.files.items():
        try:
            found = (folder / name).lstat()
            if not stat.S_ISREG(found.st_mode) or _sha256(str(folder / name), _identity(found)) != sha256:
                return name
        except OSError:
            return name
    return None


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """What changes whenever a file's content does. Nobody can set the time of change, not even the owner."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@lru_cache(maxsize=256)
def _sha256(path: str, identity: tuple[int, ...]) -> str:  # noqa: ARG001 - a changed file is another key
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(files: Files, name: str) -> Manifest:
    """The manifest of a remote policy. Raises StoreError when there is none."""
    manifest = read_manifest(files, name)
    if manifest is None:
        raise StoreError(f"no policy is published here: {MANIFEST} is missing", files.locate(name), adapter.REMEDY)
    return manifest


def _digest(data: bytes) -> str:
    return short(data, 24)


def _copy(files: Files, name: str, target: Path, keep: int) -> None:
    """Put a checked copy of a policy at `target`. Other versions of this policy and the least used copies are deleted.

    The caller holds the lock. So what a killed engine has left unfinished is deleted too. What is left of runs that nobody has
    used for a day goes as well.
    """
    part = private_folder(_COPIES, _PART)
    for left in (*part.iterdir(), *_old_runs(target.parent)):
        shutil.rmtree(left, ignore_errors=True)
    copy = fetch_folder(files, name, POLICY_REMEDY, part)
    if copy is None or target.name != f"{name}-{digest_of_manifest(_manifest(files, name))}":
        raise StoreError("the policy changed while it was read", files.locate(name), "Run the same command again")
    copy.rename(private_folder(_COPIES, target.parent.name) / target.name)  # another run may have swept its old folder
    others = sorted((path for path in target.parent.iterdir() if path != target), key=_last_used, reverse=True)
    for rank, other in enumerate(others):
        if rank >= keep - 1 or other.name.rpartition("-")[0] == name:
            shutil.rmtree(other, ignore_errors=True)


def _old_runs(own: Path) -> list[Path]:
    """The folders of other runs with copies, which nobody has used for a day."""
    runs = [path for path in own.parent.iterdir() if path.is_dir() and path.name != _PART and path != own]
    return [run for run in runs if time.time() - max(map(_last_used, (run, *run.iterdir()))) > OLD_S]


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the lock of the copies on this machine for the length of a block. The system frees that of a killed process."""
    with open(private_folder(_COPIES) / _LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another engine on this machine has just deleted it
        return 0.0
