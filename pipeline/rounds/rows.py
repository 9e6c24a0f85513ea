"""Rows of a round with the columns of several stages: for the trainer, and for the export."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract import COLUMNS
from pipeline.errors import StoreError
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round
from pipeline.stages import PLAN
from pipeline.store.directory import Store, area


def joined_round(work: Round) -> pa.Table:
    """All rows of a round, one per trace: `round`, the columns of its prompt, then the columns of every stage that exists.

    reject_reason is the first one that a stage gave. Where a shard lacks a later stage, the columns of that stage are null. Every
    shard of prompts and rollout must exist. Raises StoreError when a shard is damaged.
    """
    inventory = Inventory(work)
    entries = {stage.name: inventory.entries(stage.name) for stage in PLAN}
    tables = []
    for shard in sorted(work.shards):
        parts = {name: work.store.read(shards[shard]) for name, shards in entries.items() if shard in shards}
        parts["prompts"] = parts["prompts"].take(parts["rollout"]["prompt_index"])
        columns = {"round": pa.array([work.number] * parts["rollout"].num_rows, pa.int32())}
        columns |= {c.name: parts[c.writer][c.name] for c in COLUMNS.values() if c.writer in parts}
        for name in ("reject_reason", "reject_detail"):
            columns[name] = pc.coalesce(*(part[name] for part in parts.values()))
        tables.append(pa.table(columns))
    return pa.concat_tables(tables, promote_options="default")


def round_table(store: Store, number: int) -> pa.Table | None:
    """Training rows of a committed round, one per trace in shard order. None while the round is not committed.

    The columns are those of rollout, grade and score that training reads, prompt_tokens, and the row's first reject_reason.
    Raises StoreError when a shard is no longer the one that was committed.
    """
    ready = store.ready(number)
    if ready is None:
        return None
    where, policy = area("rounds", number), ready["policy"]
    tables = [training_rows(store, where, shard, hashes, policy) for shard, hashes in sorted(ready["shards"].items())]
    return pa.concat_tables(tables)


def training_rows(store: Store, where: str, shard: str, hashes: dict[str, str], policy: int) -> pa.Table:
    """Training rows of one shard, as in `round_table`. `hashes` has the sha256 of each stage's shard.

    `policy` is the version that had to answer. Raises StoreError when a stage has other bytes by now.
    """
    tables = {stage: _committed(store, where, stage, shard, digest) for stage, digest in hashes.items()}
    rollout = tables["rollout"]
    prompts = tables["prompts"].take(rollout["prompt_index"])
    columns = {name: rollout[name] for name in ("trace_id", "response_tokens")}
    # policy of the student log-probs: a trace that the teacher wrote was scored with the policy of its round
    by_teacher = pc.equal(rollout["trace_source"], "teacher")
    columns["policy_version"] = pc.if_else(by_teacher, pa.scalar(policy, pa.int32()), rollout["policy_version"])
    columns |= {"prompt_tokens": prompts["prompt_tokens"], "rollout_entropy": rollout["rollout_entropy"]}
    columns["advantage"] = tables["grade"]["advantage"]
    columns |= {name: tables["score"][name] for name in ("student_logprobs", "teacher_logprobs", "teacher_entropy")}
    columns["reject_reason"] = pc.coalesce(*(tables[s]["reject_reason"] for s in ("rollout", "grade", "score")))
    return pa.table(columns)


def _committed(store: Store, where: str, stage: str, shard: str, digest: str) -> pa.Table:
    """The shard with sha256 `digest`. Raises StoreError when the shard has other bytes by now."""
    entry = store.entry(where, stage, shard)
    if entry is None or entry.sha256 != digest:
        raise StoreError(
            "the shard has changed since its round was committed to the trainer",
            store.locate(f"{where}/{stage}/{shard}.json"),
            "Run `egrsd stage` for the stages that `egrsd status` shows as stale",
        )
    return store.read(entry)
