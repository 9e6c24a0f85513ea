"""Stage `label`: regime, gate and weight of every token, and spans. They are for people: training does not read them."""

from __future__ import annotations

import pyarrow as pa

from pipeline.config import Run
from pipeline.contract import COLUMNS, Scope, ShardInputs, ShardResult, Stage
from pipeline.method import regimes
from pipeline.stages.tables import Ragged


def label(grade: pa.Table, score: pa.Table, profile: pa.Table, run: Run, peak: float, vocab_size: int) -> pa.Table:
    """Regime, spans, gate and token weight of every trace that was graded and scored.

    The gate's maximum M is the largest entropy of the round (`peak`, nats), and at least label.min_normaliser. The trainer's M
    is the largest entropy of its minibatch.
    """
    shard = Ragged(STAGE, grade, score)
    entropy, offsets = shard.take(score["teacher_entropy"])
    signals = regimes.RaggedSignals(
        entropy,
        shard.take(score["teacher_logprobs"])[0],
        shard.take(score["student_logprobs"])[0],
        offsets,
        shard.rows(grade["advantage"]),
    )
    lookahead = shard.take(profile["lookahead_entropy"])[0]
    result = regimes.label(signals, lookahead, Scope(peak, vocab_size), run.profile, run.label)
    spans = result.spans
    fields = COLUMNS["spans"].type.value_type
    runs = pa.StructArray.from_arrays([pa.array(v) for v in spans[:-1]], fields=list(fields))
    return shard.table(
        {
            "regime": shard.lists(result.regime, offsets),
            "spans": shard.lists(runs, spans.offsets),
            "gate": shard.lists(result.gate, offsets),
            "token_weight": shard.lists(result.weight, offsets),
        }
    )


def _compute(shard: ShardInputs) -> ShardResult:
    scope, tables = shard.whole_round(), shard.tables
    table = label(tables["grade"], tables["score"], tables["profile"], shard.run, scope.peak, scope.vocab_size)
    return ShardResult(table, {"peak": scope.peak})


STAGE = Stage(
    "label",
    "CPU",
    "trace_id",
    reads=("teacher_entropy", "lookahead_entropy", "advantage", "student_logprobs", "teacher_logprobs"),
    settings=("profile.normaliser", "profile.tau_low", "profile.tau_high", "label"),
    compute=_compute,
    round_inputs=lambda _: ("peak",),
    after_round=True,
)
