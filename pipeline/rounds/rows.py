"""The joins of stages: the rows of a round for the trainer, and for whoever takes them elsewhere."""

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
    """One round whose traces are there, a row per trace: `round`, the prompt's columns, then those of every stage that is there.

    reject_reason is the first that any stage gave. A shard may lack later stages: its columns are null there. Raises StoreError
    when a shard is damaged.
    """
    seen = Inventory(work)
    entries = {stage.name: seen.entries(stage.name) for stage in PLAN}
    tables = []
    for shard in sorted(work.shards):
        parts = {name: work.store.read(found[shard]) for name, found in entries.items() if shard in found}
        parts["prompts"] = parts["prompts"].take(parts["rollout"]["prompt_index"])
        columns = {"round": pa.array([work.number] * parts["rollout"].num_rows, pa.int32())}
        columns |= {c.name: parts[c.writer][c.name] for c in COLUMNS.values() if c.writer in parts}
        for name in ("reject_reason", "reject_detail"):
            columns[name] = pc.coalesce(*(part[name] for part in parts.values()))
        tables.append(pa.table(columns))
    return pa.concat_tables(tables, promote_options="default")


def round_table(store: Store, number: int) -> pa.Table | None:
    """Training rows of a committed round, one per trace in shard order; None while it is not committed.

    Columns: those of rollout, grade and score that training reads, prompt_tokens of each trace's prompt, and the first
    reject_reason of the row. Raises StoreError when a shard is no longer the one that was committed.
    """
    ready = store.ready(number)
    if ready is None:
        return None
    where, policy = area("rounds", number), ready["policy"]
    tables = [training_rows(store, where, shard, hashes, policy) for shard, hashes in sorted(ready["shards"].items())]
    return pa.concat_tables(tables)


def training_rows(store: Store, where: str, shard: str, hashes: dict[str, str], policy: int) -> pa.Table:
    """Training rows of one shard (see `round_table`) whose stages have the hashes given.

    `policy` is the version that was asked to answer. Raises StoreError when a stage has other bytes by now.
    """
    tables = {stage: _committed(store, where, stage, shard, digest) for stage, digest in hashes.items()}
    rollout = tables["rollout"]
    prompts = tables["prompts"].take(rollout["prompt_index"])
    columns = {name: rollout[name] for name in ("trace_id", "response_tokens")}
    # the policy whose student log-probs these are: a trace that the teacher wrote was scored with the round's policy
    by_teacher = pc.equal(rollout["trace_source"], "teacher")
    columns["policy_version"] = pc.if_else(by_teacher, pa.scalar(policy, pa.int32()), rollout["policy_version"])
    columns |= {"prompt_tokens": prompts["prompt_tokens"], "rollout_entropy": rollout["rollout_entropy"]}
    columns["advantage"] = tables["grade"]["advantage"]
    columns |= {name: tables["score"][name] for name in ("student_logprobs", "teacher_logprobs", "teacher_entropy")}
    columns["reject_reason"] = pc.coalesce(*(tables[s]["reject_reason"] for s in ("rollout", "grade", "score")))
    return pa.table(columns)


def _committed(store: Store, where: str, stage: str, shard: str, digest: str) -> pa.Table:
    """The shard with sha256 `digest`. Raises StoreError when the shard is another one by now."""
    entry = store.entry(where, stage, shard)
    if entry is None or entry.sha256 != digest:
        raise StoreError(
            "the shard has changed since its round was committed to the trainer",
            store.locate(f"{where}/{stage}/{shard}.json"),
            "Run `egrsd stage` for the stages that `egrsd status` shows as stale",
        )
    return store.read(entry)
