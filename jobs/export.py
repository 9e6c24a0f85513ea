"""`egrsd export`: join all stages of all rounds into one self-contained Parquet dataset, one row per trace."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.opened import open_run
from jobs.terminal import session
from pipeline.errors import UserError
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import open_rounds
from pipeline.rounds.rows import joined_round
from pipeline.store.files import Files


def export_run(uri: str, out_uri: str, debug: bool) -> None:
    """Write `round-0000.parquet` and so on to a folder or URI, with every column of the contract.

    Raises UserError for a run without traces or a place that may not be written. Raises StoreError for a damaged shard, a damaged
    last policy, or when writing fails.
    """
    with session(debug) as out:
        store, run = open_run(uri)
        rounds = [work for work in open_rounds(store, run) if Inventory(work).is_whole("rollout")]
        if not rounds:
            raise UserError("no round has all its traces yet", store.uri, "Run `egrsd distill` first")
        store.check_policy(store.latest_policy())
        target, rows = Files(out_uri), 0
        for work in rounds:
            table, sink = joined_round(work), pa.BufferOutputStream()
            pq.write_table(table, sink, compression="zstd")
            target.write(f"round-{work.number:04d}.parquet", sink.getvalue())
            rows += table.num_rows
        out.say(f"{rows} traces of {len(rounds)} rounds in {out_uri}")
