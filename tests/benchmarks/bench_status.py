"""`egrsd status` with and without the checks of what an entry says, and of two checkouts of the code on one run.

    python -m tests.benchmarks.bench_status                      # entries read as typed models / as plain JSON
    python -m tests.benchmarks.bench_status RUN OTHER_CHECKOUT   # this code / that of another folder, on a run that both read

Both ways run in turn, each in a process of its own. Figures are medians: processor seconds (user and system) and wall seconds.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.store.directory import Store
from tests.benchmarks.bench_control_plane import generate

REPEATS = 5
STATUS = "from jobs.status import show; import sys; show(sys.argv[1], False)"
PLAIN = """
import dataclasses, json
from pipeline.store import manifest

typed, names = manifest.parse, [field.name for field in dataclasses.fields(manifest.Entry)]

def plain(kind, data, where, *more):
    if kind is not manifest.Entry:
        return typed(kind, data, where, *more)
    entry, document = object.__new__(kind), json.loads(data)
    for name in names:
        object.__setattr__(entry, name, document.get(name, {}))
    return entry

manifest.parse, manifest._contradiction = plain, lambda entry: None
"""


def measure(shards: int = 300) -> dict[str, float]:
    """Ratios of `status` with typed entries to that with plain ones, on a generated run of `shards` shards in three rounds."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"{folder}/run")
        generate(store, shards // 3, 3)
        here = str(Path(__file__).parents[2])
        return _compared({"typed": (STATUS, here), "plain": (PLAIN + STATUS, here)}, store.uri)


def compare(uri: str, other: str) -> dict[str, float]:
    """Ratios of `status` of this checkout to that of the checkout in the folder `other`, on the run at `uri`."""
    verb = "import runpy, sys; sys.argv[1:] = ['status', '--run', sys.argv[1]]; runpy.run_module('jobs', run_name='__main__')"
    return _compared({"this": (verb, str(Path(__file__).parents[2])), "other": (verb, other)}, uri)


def _compared(ways: dict[str, tuple[str, str]], uri: str) -> dict[str, float]:
    """Medians of each way, and the ratios of the first to the second. A way is a program and the folder of its code."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, (program, root) in ways.items():
            seconds[name].append(_timed(program, root, uri))
    figures = {f"{name}_{kind}_s": statistics.median(s[i] for s in seconds[name]) for name in ways for i, kind in _KINDS}
    first, second = ways
    return {f"{kind}_ratio": figures[f"{first}_{kind}_s"] / figures[f"{second}_{kind}_s"] for _, kind in _KINDS} | figures


_KINDS = ((0, "cpu"), (1, "wall"))


def _timed(program: str, root: str, uri: str) -> tuple[float, float]:
    """(processor seconds, wall seconds) of a program on a run, with the code in the folder `root`."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", program, uri]
    subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": root}, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


if __name__ == "__main__":
    for what, value in (compare(*sys.argv[1:]) if sys.argv[1:] else measure()).items():
        print(f"{what:16s} {value:8.3f}")
