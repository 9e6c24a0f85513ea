"""From the command to the first answers, of a new run and of one that was killed: `python -m tests.benchmarks.bench_start`.

Each repetition starts the demo in an empty folder, kills its command with SIGKILL once a policy is published, and starts it
again. Seconds are by the clock, so nothing else should run beside it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from pipeline.store.directory import Store

ANSWERS = "the first answers are there"
SETS = ("rounds=3", "evaluation.problems=0")


def begin(folder: Path) -> tuple[subprocess.Popen[str], float]:
    """The command, once its engines have given their first answers, and how many seconds that took."""
    sets = [part for text in SETS for part in ("--set", text)]
    command = [sys.executable, "-m", "jobs", "distill", "--recipe", "demo", "--run", str(folder), *sets]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if ANSWERS in line:
            return process, time.perf_counter() - begun
    raise RuntimeError(f"the command ended with {process.wait()} before its engines answered")


def measure(repeats: int = 5) -> dict[str, float]:
    """Medians of seconds, with the least and the most, of a start and of a start after SIGKILL."""
    found: dict[str, list[float]] = {"start": [], "after_kill": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            process, seconds = begin(Path(folder))
            found["start"].append(seconds)
            store = Store(folder)
            while store.latest_policy() < 1:
                time.sleep(0.1)
            process.send_signal(signal.SIGKILL)
            process.wait()
            again, seconds = begin(Path(folder))
            found["after_kill"].append(seconds)
            again.communicate()
            assert again.returncode == 0
    return {
        f"{name}_{what}": round(figure(values), 1)
        for name, values in found.items()
        for what, figure in (("s", median), ("least_s", min), ("most_s", max))
    }


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:])), indent=1))
