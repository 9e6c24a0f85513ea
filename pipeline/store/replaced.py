"""Policies that are about to be replaced: they are set aside, and deleted only when the new ones are whole.

    policy/0004.replaced-1f2e3d4c/   The adapter that was policy 4, under the first digits of its manifest's hash. Beside it
                                     lie ready.json and the trainer's metrics of round 3: what it was trained on.
    train/0004.replaced-1f2e3d4c/    The training state that stood beside it.
    run.replaced.json                The settings before. With it a replacement is going on.

No reader takes these folders for a policy, because their names are no numbers. A command may end anywhere, also by SIGKILL.
`settle` then makes the run whole again: the command calls it when it fails, and every later command when it holds the lease.
"""

from __future__ import annotations

from collections.abc import Collection

from pyarrow import fs

from pipeline.digest import short
from pipeline.errors import StoreError
from pipeline.store.directory import Store, area
from pipeline.store.files import Files
from pipeline.store.folders import MANIFEST
from pipeline.store.names import METRICS_FILE, MODELS, PASS_RATES, REPLACED, SOURCES

_MARK = ".replaced-"
_BEFORE = "run.replaced.json"


def later_policies(store: Store, first: int) -> list[int]:
    """The policies after version `first`, whole or not."""
    return [version for version in store.numbers("policy") if version > first]


def policy_hash(store: Store, version: int) -> str:
    """The first 8 hex digits of the hash of a policy's manifest, which names every file with its sha256."""
    return short(store.read_bytes(f"{area('policy', version)}/{MANIFEST}") or b"", 8)


def set_aside(store: Store, first: int) -> None:
    """Move every policy after version `first` aside, with its training state. Newest first: a crash leaves no gap.

    New policies of a replacement that was cut off are deleted instead: the ones that they were to replace are aside already.
    """
    versions = later_policies(store, first)
    if versions and store.read_bytes(_BEFORE) is None:
        store.write(_BEFORE, store.read_bytes("run.json") or b"")
    kept = {version for version, _ in _aside(store)}
    for version in reversed(versions):
        name = f"{_MARK}{policy_hash(store, version)}"
        if version not in kept:
            for beside, path in _of_round(version).items():
                _copy_file(store, path, store, f"{area('policy', version)}{name}/{beside}")
            for kind in ("train", "policy"):
                _copy(store, area(kind, version), store, area(kind, version) + name)
        _delete(store, version)


def settle(store: Store) -> str | None:
    """Make a run whole after a replacement that was cut off, and say what became of it. None when there was none.

    Before the first new policy, the old policies and settings come back. After the last one, the old policies are deleted.
    Between them nothing is done, since training can go on. Call it with the run's lease.
    """
    aside, going_on = _aside(store), store.read_bytes(_BEFORE) is not None
    new = any(store.has_policy(version) and policy_hash(store, version) != name for version, name in aside)
    if aside and all(store.has_policy(version) for version, _ in aside) and (new or not going_on):
        drop(store)
        return f"policies {aside[0][0]} to {aside[-1][0]} are replaced: the old ones are deleted."
    if not going_on:
        return None
    if not new:
        back = _put_back(store, aside)
        _delete_aside(store)
        store.delete(_BEFORE)
        return f"policies {back[0]} to {back[-1]} and the settings are as they were before." if back else None
    return (
        f"policies {aside[0][0]} to {aside[-1][0]} are replaced only up to {store.latest_policy()}. The old ones lie in "
        "policy/*.replaced-* until `egrsd train` has come to its end."
    )


def is_going_on(store: Store) -> bool:
    """Whether a replacement was cut off between its first and its last policy. Call `settle` before."""
    return store.read_bytes(_BEFORE) is not None


def drop(store: Store) -> None:
    """Delete the policies that were set aside. Call it when the new ones are whole."""
    store.delete(_BEFORE)  # first: a later command would put the settings back
    _delete_aside(store)


def _delete_aside(store: Store) -> None:
    for kind in ("train", "policy"):
        for name in store.named(kind, REPLACED):
            store.delete(f"{kind}/{name[0]}")


def _aside(store: Store) -> list[tuple[int, str]]:
    """Version and hash of every policy that was set aside, in order."""
    return sorted((int(name["number"]), name[0].partition(_MARK)[2]) for name in store.named("policy", REPLACED))


def _put_back(store: Store, aside: list[tuple[int, str]]) -> list[int]:
    """Bring settings and policies back. Returns the versions that were set aside."""
    if aside:
        store.write("run.json", store.read_bytes(_BEFORE) or b"")
    for version, hashed in aside:
        if not store.has_policy(version):  # otherwise the copy aside was not finished
            _delete(store, version)
            for beside, path in _of_round(version).items():
                _copy_file(store, f"{area('policy', version)}{_MARK}{hashed}/{beside}", store, path)
            for kind in ("train", "policy"):
                _copy(store, f"{area(kind, version)}{_MARK}{hashed}", store, area(kind, version), _of_round(version))
    return [version for version, _ in aside]


def _of_round(version: int) -> dict[str, str]:
    """What tells of a policy's training, by its name beside the policy that is aside. Training it again writes them anew."""
    return {"ready.json": f"{area('rounds', version - 1)}/ready.json", "train.jsonl": f"metrics/{version - 1:04d}-train.jsonl"}


def _delete(store: Store, version: int) -> None:
    store.delete(f"{area('policy', version)}/{MANIFEST}")
    store.delete(area("policy", version))
    store.delete(area("train", version))


def copy_until(store: Store, target: Store, first: int) -> None:
    """Copy what training from policy `first` on needs into another run: rounds, metrics, sources and policies up to `first`."""
    kept = [area(kind, version) for version in range(1, first + 1) for kind in ("train", "policy")]
    kept += [area("evals", version) for version in store.numbers("evals") if version <= first]
    for folder in ["rounds", *kept]:
        _copy(store, folder, target, folder)
    for name in store.named("metrics", METRICS_FILE):
        if name["writer"] != "train" or int(name["number"]) < first:
            _copy_file(store, f"metrics/{name[0]}", target, f"metrics/{name[0]}")
    for path in (SOURCES, MODELS, PASS_RATES):
        _copy_file(store, path, target, path)


def check_copy(store: Store, target: Store, folders: list[str]) -> None:
    """Raise StoreError when a copied folder of rounds is not one state of the original, which another command has changed.

    A data file is named by its content, and its entry says which one it is. So plans and entries that are still the same as their
    copies prove that all files belong together.
    """
    for folder in folders:
        for name in _files(target, folder):
            if name.endswith(".json") and store.read_bytes(f"{folder}/{name}") != target.read_bytes(f"{folder}/{name}"):
                where = store.locate(f"{folder}/{name}")
                raise StoreError("has changed while it was copied", where, "Run the same command again, or name another --out")


def _files(store: Files, folder: str) -> list[str]:
    """The files below a folder by their paths in it. Empty when the folder does not exist."""
    filesystem, root = store.opened
    found = filesystem.get_file_info(fs.FileSelector(f"{root}/{folder}", recursive=True, allow_not_found=True))
    return [info.path.rpartition(f"{root}/{folder}/")[2] for info in found if info.type == fs.FileType.File]


def _copy(source: Files, folder: str, target: Files, new: str, without: Collection[str] = ()) -> None:
    """Copy a folder, if it exists. Its manifest comes last, since a folder without one counts as unfinished."""
    for name in sorted(set(_files(source, folder)) - set(without), key=lambda name: (name == MANIFEST, name)):
        _copy_file(source, f"{folder}/{name}", target, f"{new}/{name}")


def _copy_file(source: Files, path: str, target: Files, new: str) -> None:
    if data := source.read_bytes(path):  # no file of ours is empty
        target.write(new, data)
