"""Undoes the mend of a row of the README's table, and sees its test fail: `python -m tests.mutations [ROW ...]`.

Each mutation of mutations.toml is one change of text in a copy of the tree. A test that passes all the same guards nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
HANGS_S = 180  # a test without its mend may wait for ever


@dataclass(frozen=True)
class Mutation:
    """One mend undone.

    row: its name in the table. path, old, new: the text that changes. tests: one of them must fail.
    """

    row: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


def mutations() -> list[Mutation]:
    """All of mutations.toml, in their order."""
    table = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text(encoding="utf-8"))
    return [Mutation(row, **one | {"tests": tuple(one["tests"])}) for row, one in table.items()]


def dies(mutation: Mutation) -> bool:
    """Whether a test of the row fails once its mend is undone. Raises ValueError for text that is not there once."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("pipeline", "actors", "jobs", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        target = tree / mutation.path
        text = target.read_text(encoding="utf-8")
        if text.count(mutation.old) != 1:
            raise ValueError(f"{mutation.row}: {mutation.old!r} stands {text.count(mutation.old)} times in {mutation.path}")
        target.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", f"--timeout={HANGS_S}", *mutation.tests]
        ended = subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": folder}, capture_output=True, text=True)
    if ended.returncode not in (0, 1):
        raise ValueError(f"{mutation.row}: pytest ended with {ended.returncode}: {ended.stdout[-500:]}")
    return ended.returncode == 1


def main() -> int:
    """Try the named rows, or all. The exit code is the number of mutations that no test noticed."""
    survived = 0
    for mutation in mutations():
        if not sys.argv[1:] or mutation.row in sys.argv[1:]:
            died = dies(mutation)
            survived += not died
            sys.stdout.write(f"{mutation.row}: {'a test fails' if died else 'NO TEST FAILS'}\n")
            sys.stdout.flush()
    return survived


if __name__ == "__main__":
    sys.exit(main())
