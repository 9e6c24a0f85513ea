"""Profile and label from Parquet to Parquet, against bare reading and writing: `python -m tests.benchmarks.bench_parquet`.

The stages do all that a run asks of them: they find what is stale, read and check their inputs, compute, check, write, hash, sync
and commit. Bare means `pyarrow.parquet` alone: the columns that the stages read, and the tables that they wrote, in the same
encoding. The shares are of processor time, which another program's load does not change.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.fakes import FakeEngine
from pipeline.contract import Failure, Generate, Generation, Policy, Sampling, Score, Sequence
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.recipes import demo
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round, plan_round, with_engines
from pipeline.rounds.running.schedule import execute
from pipeline.rounds.running.shard import bring_up_to_date
from pipeline.stages import LABELS, MEASURE, STAGES
from pipeline.store.directory import Store
from pipeline.store.shards import to_parquet

LENGTHS = (100, 2000)  # tokens of a trace


class LongTraces(FakeEngine):
    """An engine whose traces are long, and whose entropies are mostly near 0, as a teacher's are."""

    def _write(self, request: Generate, policy: Policy, sampling: Sampling) -> Generation | Failure:
        rng = np.random.default_rng(request.seed)
        size = int(rng.integers(*LENGTHS))
        tokens = rng.integers(4, self._behaviour.vocab_size, size).astype(np.int32)
        return Generation(tokens, *_signals(rng, size), 0.0, "stop", policy.version)

    def _read(self, sequence: Sequence, policy: Policy) -> Score | Failure:
        rng = np.random.default_rng([policy.version, len(sequence.prompt), *sequence.response[:8]])
        return Score(np.asarray(sequence.response, np.int32), *_signals(rng, len(sequence.response)), 0.0)


def _signals(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    entropy = rng.gamma(0.4, 0.8, size) * (rng.random(size) < 0.6)
    return -rng.exponential(0.5, size).astype(np.float32), np.minimum(entropy, 4.0).astype(np.float32)


def measured_round(folder: str, shards: int) -> Round:
    """A round of shards of 64 long traces, measured and not labelled."""
    sets = [
        f"rollout.prompts_per_round={shards * 8}",
        "rollout.prompts_per_shard=8",
        "rollout.group_size=8",
        f"shards_here={shards}",
    ]
    run = resolve(demo(), [*sets, "model.max_model_len=4096", "rollout.max_new_tokens=4000"])
    source = open_source(run.source)
    work = plan_round(Store(folder), run, "rounds", 0, 0, source)
    engine = LongTraces(run.model, run.engines.rollout, run.score)
    execute(with_engines(work, {"rollout": engine, "score": engine}), MEASURE, source)
    return work


def staged(work: Round) -> float:
    """Processor seconds in which profile and label bring all shards up to date."""

    def bring() -> None:
        for name in LABELS:
            seen = Inventory(work, whole=False)
            _ = seen.scope
            for first, shard in enumerate(work.shards):
                bring_up_to_date(seen, STAGES[name], shard, first * 8, force=True)

    return _cpu_s(bring)


def bare(work: Round) -> float:
    """Processor seconds in which pyarrow reads what these stages read and writes what they wrote."""
    folder, written = Path(work.store.uri), []
    for name in LABELS:
        for shard in work.shards:
            entry = work.store.entry(work.area, name, shard)
            assert entry is not None
            written.append((STAGES[name], work.store.read(entry)))
    read = []
    for name in LABELS:
        for shard in work.shards:
            for writer in STAGES[name].inputs:
                entry = work.store.entry(work.area, writer, shard)
                assert entry is not None
                read.append((folder / work.area / writer / entry.data, STAGES[name].reads_of(STAGES[writer])))

    def copy() -> None:
        for path, columns in read:
            with pq.ParquetFile(path) as file:
                file.read(columns=columns)
        for number, (stage, table) in enumerate(written):
            (folder / f"bare-{number}.parquet").write_bytes(to_parquet(stage, table))

    return _cpu_s(copy)


def _cpu_s(work: Callable[[], None]) -> float:
    gc.collect()
    begun = time.process_time()
    work()
    return time.process_time() - begun


def measure(shards: int = 16, repeats: int = 7) -> dict[str, float]:
    """The share of bare reading and writing in the stages' time (medians), its least and most, and tokens a processor second."""
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as folder:
        work = measured_round(folder, shards)
        staged(work)
        bare(work)
        both = [(staged(work), bare(work)) for _ in range(repeats)]
        entries = work.store.entries(work.area, "label")
        tokens = sum(entry.tokens for entry in entries.values())
    shares = sorted(bare_s / staged_s for staged_s, bare_s in both)
    return {
        "parquet_share": median(shares),
        "parquet_share_least": shares[0],
        "parquet_share_most": shares[-1],
        "tokens_per_cpu_s": tokens / median(staged_s for staged_s, _ in both),
        "bare_tokens_per_cpu_s": tokens / median(bare_s for _, bare_s in both),
    }


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name} {value:.3f}")
