"""Stage `profile`: lookahead entropy, statistics and regime shares of every trace."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.config import Run
from pipeline.contract import Regime, ShardInputs, ShardResult, Stage
from pipeline.method import regimes
from pipeline.stages.tables import Ragged


def profile(score: pa.Table, run: Run, peak: float, vocab_size: int) -> pa.Table:
    """Lookahead entropy, statistics and regime shares of every scored trace.

    `peak` is the largest entropy of the round, in nats. Thresholds are relative to it when profile.normaliser is batch_max.
    """
    shard = Ragged(STAGE, score, score)
    entropy, offsets = shard.take(score["teacher_entropy"])
    scale = regimes.threshold_scale(peak, vocab_size, run.profile, run.label)
    result = regimes.profile(entropy, offsets, scale, run.profile)
    stats = result.statistics
    columns = {"lookahead_entropy": shard.lists(result.lookahead, offsets)}
    for name, values in zip(("mean", "p50", "p90", "max"), stats, strict=True):
        columns[f"entropy_{name}"] = shard.scalars(values)
    for code, name in enumerate(Regime.NAMES):
        columns[f"share_{name}"] = shard.scalars(np.ascontiguousarray(result.shares[:, code]))
    return shard.table(columns)


def _compute(shard: ShardInputs) -> ShardResult:
    scope = shard.whole_round()
    return ShardResult(profile(shard.tables["score"], shard.run, scope.peak, scope.vocab_size), {})


STAGE = Stage(
    "profile",
    "CPU",
    "trace_id",
    reads=("teacher_entropy",),
    settings=("profile", "label.min_normaliser"),
    compute=_compute,
    round_inputs=lambda run: ("peak",) if run.profile.normaliser == "batch_max" else (),
    after_round=True,
)
