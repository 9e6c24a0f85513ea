"""Policies that are about to be replaced: they are set aside, and deleted only when the new ones are whole.

    policy/0004.replaced-1f2e3d4c/   The adapter that was policy 4, under the first digits of its manifest's hash.
    train/0004.replaced-1f2e3d4c/    The training state that stood beside it.

No reader takes these folders for a policy, because their names are no numbers.
"""

from __future__ import annotations

from pyarrow import fs

from pipeline.digest import short
from pipeline.store.directory import Store, area
from pipeline.store.files import Files
from pipeline.store.folders import MANIFEST
from pipeline.store.names import METRICS_FILE, REPLACED, SOURCES

_MARK = ".replaced-"


def later_policies(store: Store, first: int) -> list[int]:
    """The policies after version `first`, whole or not."""
    return [version for version in store.numbers("policy") if version > first]


def policy_hash(store: Store, version: int) -> str:
    """The first 8 hex digits of the hash of a policy's manifest, which names every file with its sha256."""
    return short(store.read_bytes(f"{area('policy', version)}/{MANIFEST}") or b"", 8)


def set_aside(store: Store, first: int) -> None:
    """Move every policy after version `first` aside, with its training state. Newest first: a crash leaves no gap."""
    for version in reversed(later_policies(store, first)):
        name = f"{_MARK}{policy_hash(store, version)}"
        for kind in ("train", "policy"):
            folder = area(kind, version)
            _copy(store, folder, store, folder + name)
        store.delete(f"{area('policy', version)}/{MANIFEST}")
        store.delete(area("policy", version))
        store.delete(area("train", version))


def put_back(store: Store) -> list[int]:
    """Move the policies that were set aside back to their places, where none has come meanwhile. Returns their versions."""
    back = []
    for name in store.named("policy", REPLACED):
        number = int(name["number"])
        if not store.has_policy(number):
            for kind in ("train", "policy"):
                _copy(store, f"{kind}/{name[0]}", store, area(kind, number))
                store.delete(f"{kind}/{name[0]}")
            back.append(number)
    return back


def drop(store: Store) -> None:
    """Delete the policies that were set aside. Call it when the new ones are whole."""
    for kind in ("policy", "train"):
        for name in store.named(kind, REPLACED):
            store.delete(f"{kind}/{name[0]}")


def copy_until(store: Store, target: Store, first: int) -> None:
    """Copy what training from policy `first` on needs into another run: rounds, metrics, sources and policies up to `first`."""
    kept = [area(kind, version) for version in range(1, first + 1) for kind in ("train", "policy")]
    kept += [area("evals", version) for version in store.numbers("evals") if version <= first]
    for folder in ["rounds", *kept]:
        _copy(store, folder, target, folder)
    for name in store.named("metrics", METRICS_FILE):
        if name["writer"] != "train" or int(name["number"]) < first:
            _copy_file(store, f"metrics/{name[0]}", target, f"metrics/{name[0]}")
    _copy_file(store, SOURCES, target, SOURCES)


def _copy(source: Files, folder: str, target: Files, new: str) -> None:
    """Copy a folder, if it exists. Its manifest comes last, since a folder without one counts as unfinished."""
    filesystem, root = source.opened
    found = filesystem.get_file_info(fs.FileSelector(f"{root}/{folder}", recursive=True, allow_not_found=True))
    names = [info.path.rpartition(f"{root}/{folder}/")[2] for info in found if info.type == fs.FileType.File]
    for name in sorted(names, key=lambda name: (name == MANIFEST, name)):
        _copy_file(source, f"{folder}/{name}", target, f"{new}/{name}")


def _copy_file(source: Files, path: str, target: Files, new: str) -> None:
    data = source.read_bytes(path)
    if data is not None:
        target.write(new, data)
