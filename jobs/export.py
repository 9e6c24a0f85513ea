"""`egrsd export`: all stages of all rounds as one self-contained Parquet dataset, a row per trace."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.terminal import session
from pipeline import contract
from pipeline.errors import UserError
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import open_rounds
from pipeline.stages import PLAN
from pipeline.store.directory import Store, area
from pipeline.store.files import Files


def export_run(uri: str, out_uri: str, debug: bool) -> None:
    """Write `round-0000.parquet` ... to a folder or URI: every column of the contract, joined.

    Raises UserError on a run without traces or a place that may not be written, StoreError when writing fails.
    """
    with session(debug) as out:
        store = Store(uri)
        run = store.load_run()
        rounds = [
            work.number for work in open_rounds(store, run) if work.shards.keys() <= store.entries(work.area, "rollout").keys()
        ]
        if not rounds:
            raise UserError("no round has all its traces yet", store.uri, "Run `egrsd distill` first")
        target, rows = Files(out_uri), 0
        for number in rounds:
            table, sink = joined_round(store, number), pa.BufferOutputStream()
            pq.write_table(table, sink, compression="zstd")
            target.write(f"round-{number:04d}.parquet", sink.getvalue())
            rows += table.num_rows
        out.say(f"{rows} traces of {len(rounds)} rounds in {out_uri}")


def joined_round(store: Store, number: int) -> pa.Table:
    """One round, a row per trace: the prompt's columns, then those of every stage that is there; `round` first.

    reject_reason is the first that any stage gave.
    """
    where = area("rounds", number)
    plan = read_plan(store, "rounds", number)
    assert plan is not None
    entries = {stage.name: store.entries(where, stage.name) for stage in PLAN}
    tables = []
    for shard in sorted(plan.shards):
        parts = {name: store.read(found[shard]) for name, found in entries.items() if shard in found}
        parts["prompts"] = parts["prompts"].take(parts["rollout"]["prompt_index"])
        columns = {"round": pa.array([number] * parts["rollout"].num_rows, pa.int32())}
        columns |= {c.name: parts[c.writer][c.name] for c in contract.COLUMNS.values() if c.writer in parts}
        for name in ("reject_reason", "reject_detail"):
            columns[name] = pc.coalesce(*(part[name] for part in parts.values()))
        tables.append(pa.table(columns))
    return pa.concat_tables(tables, promote_options="default")  # a shard may lack later stages: null there
