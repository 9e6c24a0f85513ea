"""Memory of the trainer's rows: a round read shard by shard against a round in one table.

`python -m tests.benchmarks.bench_stored`. Traces of 50 and 150 tokens, 256 a step, in shards of 256. Each figure is the growth of
the resident set of a process of its own, from the first shard to the last step. The slope between two sizes of the round says
what every further trace costs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from pipeline.config import Objective
from pipeline.training import batches
from pipeline.training.batches import RoundTable
from pipeline.training.stored import StoredRound, stored

SIZES = (20_000, 60_000)
SHARD = BATCH = 256
PROMPT, RESPONSE, VOCAB = 50, 150, 49_152
STEPS = 40  # steps whose rows are read


def measure() -> dict[str, float]:
    """Bytes of memory for every further trace, MB at the larger size, and the bytes of two steps' rows."""
    peaks = {(kind, size): _measured(kind, size) for kind in ("table", "stored") for size in SIZES}
    small, large = SIZES
    slopes = {kind: (peaks[kind, large] - peaks[kind, small]) / (large - small) for kind in ("table", "stored")}
    return {
        "table_bytes_a_trace": slopes["table"],
        "stored_bytes_a_trace": slopes["stored"],
        "table_mb": peaks["table", large] / 1e6,
        "stored_mb": peaks["stored", large] / 1e6,
        "memory_ratio": slopes["stored"] / slopes["table"],
        "two_steps_mb": 2 * BATCH * 4 * (PROMPT + 4 * RESPONSE) / 1e6,
    }


def _measured(kind: str, size: int) -> float:
    code = f"from tests.benchmarks.bench_stored import grown; print(grown({kind!r}, {size}))"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def grown(kind: str, size: int) -> int:
    """Bytes by which this process grows while it reads a round of `size` traces and the rows of STEPS steps, at most."""
    list(_tables(SHARD))
    process = psutil.Process()
    before, most = process.memory_info().rss, 0
    with tempfile.TemporaryDirectory() as folder:
        if kind == "table":
            table = pa.concat_tables(list(_tables(size)))
            traces = batches.usable(RoundTable(0, 0, table), 0)
        else:
            traces = stored(StoredRound(0, 0, lambda: _tables(size), Path(folder)), 0, Objective(), VOCAB)
        for rows in batches.steps(len(traces.advantage), BATCH, 0, 0)[:STEPS]:
            batches.share(traces, rows, 0, 1, 16_384)
            most = max(most, process.memory_info().rss)
    return most - before


def _tables(size: int) -> Iterator[pa.Table]:
    """The training rows of a round, shard by shard."""
    rng = np.random.default_rng(0)
    for start in range(0, size, SHARD):
        num = min(SHARD, size - start)
        columns = {name: _lists(rng.integers(0, VOCAB, num * n).astype(np.int32), n) for name, n in LISTS.items()}
        columns |= {name: _lists(rng.random(num * RESPONSE).astype(np.float32), RESPONSE) for name in batches.SIGNALS}
        ids = pa.array([f"r0000-{start + i:07d}" for i in range(num)])
        floats, versions = pa.array(np.ones(num, np.float32)), pa.array(np.zeros(num, np.int32))
        columns |= {"trace_id": ids, "advantage": floats, "policy_version": versions, "reject_reason": pa.nulls(num, pa.string())}
        yield pa.table(columns)


LISTS = {"prompt_tokens": PROMPT, "response_tokens": RESPONSE}


def _lists(flat: np.ndarray, length: int) -> pa.Array:
    return pa.ListArray.from_arrays(np.arange(0, len(flat) + 1, length, dtype=np.int32), pa.array(flat))


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
