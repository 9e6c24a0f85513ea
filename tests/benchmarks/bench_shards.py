"""Profile and label from Parquet to Parquet: read, verify, compute, commit, on one core. Needed: 3 M tokens/s."""

from __future__ import annotations

import tempfile
import time

import numpy as np
import pyarrow as pa

from pipeline import contract, recipes
from pipeline.config import Run
from pipeline.stages import STAGES
from pipeline.stages.label import label as label_shard
from pipeline.stages.profile import profile as profile_shard
from pipeline.store.directory import Store
from pipeline.store.manifest import Entry, Origin

AREA = "rounds/0000"
ROWS, TOKENS = 4000, 500


def measure(repeats: int = 5) -> dict[str, float]:
    """Tokens per second (best of `repeats`) of profile + label of one 2 M token shard, one thread."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        num_tokens = _commit_inputs(store)
        best = 0.0
        for _ in range(repeats):
            start = time.perf_counter()
            _profile_and_label(store, recipes.demo())
            best = max(best, num_tokens / (time.perf_counter() - start))
    return {"tokens_per_second": best}


def _profile_and_label(store: Store, run: Run) -> None:
    """What the two stages do to a shard, from the bytes of their inputs to the bytes they commit."""
    score, grade = (store.entry(AREA, name, "0000") for name in ("score", "grade"))
    peak, vocab = score.facts["entropy_max"], score.facts["vocab_size"]
    profile = profile_shard(store.read(score, STAGES["profile"].reads_of(STAGES["score"])), run, peak, vocab)
    done = _commit(store, "profile", profile)
    label = STAGES["label"]
    graded, scored, profiled = (store.read(entry, label.reads_of(STAGES[entry.stage])) for entry in (grade, score, done))
    _commit(store, "label", label_shard(graded, scored, profiled, run, peak, vocab))


def _commit(store: Store, name: str, table: pa.Table, **facts: float) -> Entry:
    return store.commit(AREA, STAGES[name], "0000", table, Origin(facts=facts))


def _commit_inputs(store: Store) -> int:
    rng = np.random.default_rng(0)
    lengths = rng.integers(TOKENS // 2, TOKENS * 3 // 2, ROWS)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())

    def ragged(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values.astype(np.float32)))

    size = int(lengths.sum())
    entropy = np.minimum(rng.gamma(0.3, 1.0, size), 11.9)  # at most ln 151 936
    teacher = -rng.exponential(0.5, size)
    keys = {"trace_id": [f"t{i}" for i in range(ROWS)], "reject_reason": [None] * ROWS, "reject_detail": [None] * ROWS}
    score = {
        **keys,
        "student_logprobs": ragged(np.minimum(teacher + rng.normal(0, 0.05, size), 0)),
        "teacher_logprobs": ragged(teacher),
        "teacher_entropy": ragged(entropy),
        "entropy_method": ["exact"] * ROWS,
        "entropy_error": [0.0] * ROWS,
        "student_logprob_source": ["rollout"] * ROWS,
        "student_logprob_gap": [None] * ROWS,
    }
    said = {"verdict": ["correct"] * ROWS, "extracted_answer": ["7"] * ROWS, "reward": [1.0] * ROWS}
    grade = {**keys, **said, "advantage": rng.normal(0, 1, ROWS)}
    facts = {"entropy_max": float(np.float32(entropy.max())), "vocab_size": 151_936}
    for name, columns in (("score", score), ("grade", grade)):
        _commit(store, name, pa.table(columns, schema=contract.schema(STAGES[name])), **facts)
    return size


if __name__ == "__main__":
    for key, value in measure().items():
        print(f"{key:<60} {value:14,.0f}")
