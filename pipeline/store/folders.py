"""Folders that appear as a whole: policies and training states.

The manifest of a folder names every file with its sha256 and its size, and is written last. A folder without a manifest does not
exist. Manifests of early versions have no sizes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.digest import short
from pipeline.errors import StoreError
from pipeline.store.documents import RESTORE, Count, Document, Sha256, check
from pipeline.store.files import Files
from pipeline.store.names import Plain

MANIFEST = "manifest.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIMIZER, CURSOR = "optimizer.safetensors", "cursor.json"
CONFIG = "config.json"  # of a policy that is whole weights (model.tuning full)
NEEDED = {"policy": (ADAPTER, ADAPTER_CONFIG), "train": (ADAPTER, ADAPTER_CONFIG, OPTIMIZER, CURSOR)}  # files, by kind of folder
WEIGHTS = "weights"  # how the names of a training state's whole weights begin
NEEDED_WHOLE = {"policy": (CONFIG,), "train": (CURSOR,)}  # the same for whole weights, whose files have numbers in their names
POLICY_REMEDY = "Delete its folder and those of all later policies, and resume: they are trained again"
STATE_REMEDY = "Delete the folder and resume"
DROPPED = "its weights were dropped, as train.keep_policies asked"
DROPPED_REMEDY = "Use a policy that is kept: the first, the last ones, and those with an evaluation"


class Manifest(Document):
    """manifest.json of a policy or a training state.

    files: sha256 of every file. sizes: bytes of every file; empty in manifests of early versions. dropped: whether the weights
    are gone on purpose. The manifest stays, since shards are stale when its hash changes.
    """

    files: Annotated[dict[Plain, Sha256], Field(min_length=1, max_length=1000)]
    sizes: dict[Plain, Count] = Field(default_factory=dict)
    dropped: bool = False


def put_folder(files: Files, path: str, folder: Path) -> None:
    """Copy the files of a local folder to `path`, and write the manifest last."""
    files.delete(f"{path}/{MANIFEST}")
    hashes, sizes = {}, {}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        hashes[file.name], sizes[file.name] = hashlib.sha256(data).hexdigest(), len(data)
        files.write(f"{path}/{file.name}", data)
    document = check(Manifest, {"files": hashes, "sizes": sizes}, files.locate(path))
    files.write_json(f"{path}/{MANIFEST}", document.model_dump(exclude_defaults=True))


def drop_weights(files: Files, path: str) -> None:
    """Delete the weights of a policy on purpose, and say so in its manifest first. A folder without a manifest is left alone."""
    manifest = read_manifest(files, path)
    if manifest is None:
        return
    if not manifest.dropped:
        files.write_json(f"{path}/{MANIFEST}", manifest.model_copy(update={"dropped": True}).model_dump(exclude_defaults=True))
    for name in filter(is_weights, manifest.files):
        files.delete(f"{path}/{name}")


def is_weights(name: str) -> bool:
    """Whether a file of a policy has its weights: an adapter's, or a part of whole weights."""
    return name.endswith(".safetensors")


def is_whole(files: Files, path: str) -> bool:
    """Whether the folder at `path` has a manifest. Its files are not checked."""
    return files.read_bytes(f"{path}/{MANIFEST}") is not None


def digest_of(files: Files, path: str) -> str:
    """Hash of the content of a folder, as its manifest tells it. It is the same with and without sizes in the manifest."""
    manifest = read_manifest(files, path)
    return digest_of_manifest(manifest) if manifest is not None else short(b"")


def digest_of_manifest(manifest: Manifest) -> str:
    """Hash of the content that a manifest tells, without the sizes."""
    return short(json.dumps({"files": manifest.files}, indent=1, sort_keys=True).encode())


def cut_short(files: Files, path: str) -> str | None:
    """The first file of a folder that is missing or has another size than its manifest says, with both sizes.

    None when all is well. No file is read, so this does not prove the content: `check_folder` does.
    """
    manifest = read_manifest(files, path)
    for name in manifest.files if manifest is not None else ():
        if manifest is not None and manifest.dropped and is_weights(name):
            continue
        size, expected = files.size(f"{path}/{name}"), manifest.sizes.get(name) if manifest is not None else None
        if size is None:
            return f"{name} is missing"
        if expected is not None and size != expected:
            return f"{name} has {size} bytes, and {expected} were written"
    return None


def is_dropped(files: Files, path: str) -> bool:
    """Whether the weights of the policy at `path` were dropped on purpose."""
    manifest = read_manifest(files, path)
    return manifest is not None and manifest.dropped


def check_folder(files: Files, path: str, remedy: str) -> None:
    """Raise StoreError, with `remedy`, when the folder has no manifest or a file is missing or damaged."""
    manifest = read_manifest(files, path)
    if manifest is None:
        raise StoreError("is not published", files.locate(path), remedy)
    for _ in _checked(files, path, manifest, remedy):
        pass


def fetch_folder(files: Files, path: str, remedy: str, above: Path | None = None) -> Path | None:
    """A local copy of the folder, or the folder itself on a local disk. Every file is checked. None without a manifest.

    A copy lies in the folder `above`, or among the temporary ones. Its caller deletes it. Raises StoreError, with `remedy`, when
    a file is missing or damaged.
    """
    manifest = read_manifest(files, path)
    if manifest is None:
        return None
    if files.local_root is not None:
        for _ in _checked(files, path, manifest, remedy):
            pass
        return files.local_root / path
    target = Path(tempfile.mkdtemp(prefix="egrsd-", dir=above))
    try:
        for name, data in _checked(files, path, manifest, remedy):
            (target / name).write_bytes(data)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return target


def read_manifest(files: Files, path: str) -> Manifest | None:
    """The manifest of a folder, or None when there is none. Raises StoreError for a damaged one.

    A manifest is damaged, too, when it does not name a file that every folder of its kind has, or names no size for one.
    """
    manifest = files.read_document(f"{path}/{MANIFEST}", Manifest)
    if manifest is not None:
        kinds = NEEDED_WHOLE if any(name == CONFIG or name.startswith(WEIGHTS) for name in manifest.files) else NEEDED
        needed = {*kinds.get(path.partition("/")[0], ()), *manifest.sizes}
        if missing := sorted(needed - manifest.files.keys()):
            raise StoreError(f"files: {missing[0]} is missing", files.locate(f"{path}/{MANIFEST}"), RESTORE)
        if manifest.sizes and (missing := sorted(manifest.files.keys() - manifest.sizes.keys())):
            raise StoreError(f"sizes: {missing[0]} is missing", files.locate(f"{path}/{MANIFEST}"), RESTORE)
    return manifest


def _checked(files: Files, path: str, manifest: Manifest, remedy: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file in the manifest. Raises StoreError when a file is missing or its sha256 differs."""
    if manifest.dropped:
        raise StoreError(DROPPED, files.locate(path), DROPPED_REMEDY)
    for name, digest in manifest.files.items():
        data = files.read_bytes(f"{path}/{name}")
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            raise StoreError("the file is missing or damaged", files.locate(f"{path}/{name}"), remedy)
        yield name, data
