"""Folders that appear as a whole: policies and training states.

The manifest of a folder names every file with its sha256, and is written last. A folder without a manifest does not exist.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.store.files import Files

MANIFEST = "manifest.json"
POLICY_REMEDY = "Delete its folder and those of all later policies, and resume: they are trained again"
STATE_REMEDY = "Delete the folder and resume"


def put_folder(files: Files, path: str, folder: Path) -> None:
    """Copy the files of a local folder to `path`, and write the manifest last."""
    hashes = {}
    files.delete(f"{path}/{MANIFEST}")
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        files.write(f"{path}/{file.name}", data)
        hashes[file.name] = hashlib.sha256(data).hexdigest()
    files.write_json(f"{path}/{MANIFEST}", {"files": hashes})


def is_whole(files: Files, path: str) -> bool:
    """Whether the folder at `path` has a manifest. Its files are not checked."""
    return files.read_bytes(f"{path}/{MANIFEST}") is not None


def check_folder(files: Files, path: str, remedy: str) -> None:
    """Raise StoreError, with `remedy`, when the folder has no manifest or a file is missing or damaged."""
    manifest = _manifest(files, path)
    if manifest is None:
        raise StoreError("is not published", files.locate(path), remedy)
    for _ in _checked(files, path, manifest, remedy):
        pass


def fetch_folder(files: Files, path: str, remedy: str) -> Path | None:
    """A local copy of the folder, or the folder itself on a local disk. Every file is checked. None without a manifest.

    Raises StoreError, with `remedy`, when a file is missing or damaged. The caller deletes a copy.
    """
    manifest = _manifest(files, path)
    if manifest is None:
        return None
    if files.local_root is not None:
        for _ in _checked(files, path, manifest, remedy):
            pass
        return files.local_root / path
    target = Path(tempfile.mkdtemp(prefix="egrsd-"))
    try:
        for name, data in _checked(files, path, manifest, remedy):
            (target / name).write_bytes(data)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return target


def _manifest(files: Files, path: str) -> dict[str, str] | None:
    """The sha256 of each file in a folder, by name. None when there is no manifest."""
    document = files.read_json(f"{path}/{MANIFEST}", "files")
    return None if document is None else document["files"]


def _checked(files: Files, path: str, manifest: dict[str, str], remedy: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file in the manifest. Raises StoreError when a file is missing or its sha256 differs."""
    for name, digest in manifest.items():
        data = files.read_bytes(f"{path}/{name}")
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            raise StoreError("the file is missing or damaged", files.locate(f"{path}/{name}"), remedy)
        yield name, data
