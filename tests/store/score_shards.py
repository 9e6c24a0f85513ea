"""Shards of scores to commit."""

import pyarrow as pa

from pipeline import contract
from pipeline.stages import STAGES
from pipeline.store.manifest import Origin

SCORE = STAGES["score"]


def score_table(rows=3, tokens=4, **replaced):
    """A valid score shard, with columns replaced."""
    values = {
        "trace_id": [f"t{i}" for i in range(rows)],
        "reject_reason": [None] * rows,
        "reject_detail": [None] * rows,
        "entropy_method": ["exact"] * rows,
        "entropy_error": [0.0] * rows,
        "student_logprob_source": ["rollout"] * rows,
        "student_logprob_gap": [None] * rows,
    }
    values |= {name: [[-0.5] * tokens] * rows for name in ("student_logprobs", "teacher_logprobs")}
    values["teacher_entropy"] = [[0.25] * tokens] * rows
    return pa.table(values | replaced, schema=contract.schema(SCORE))


def commit(target, table=None, shard="0000", **facts):
    table = score_table() if table is None else table
    return target.commit("rounds/0000", SCORE, shard, table, Origin("s", {"rollout": "x"}, 0.1, facts))
