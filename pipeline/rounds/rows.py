"""The rows of a round, joined over its stages."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract import COLUMNS
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round
from pipeline.stages import PLAN


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
