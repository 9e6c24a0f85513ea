"""`egrsd export`: join all stages of all rounds into one self-contained Parquet dataset, one row per trace."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.opened import open_run
from jobs.terminal import session
from pipeline.errors import UserError, command
from pipeline.notices import NOTICE_S, late
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import open_rounds
from pipeline.rounds.rows import joined_round
from pipeline.store.files import Files


def export_run(uri: str, out_uri: str, debug: bool, replace: bool = False) -> None:
    """Write `round-0000.parquet` and so on to a folder or URI, with every column of the contract.

    Without `replace`, rounds that are there already stay. Raises UserError for them, for a run without traces or a place that
    may not be written, and StoreError for a damaged shard or last policy, or when
    writing fails.
    """
    with session(debug) as out:
        store, run = open_run(uri)
        rounds = [work for work in open_rounds(store, run) if Inventory(work).is_whole("rollout")]
        if not rounds:
            raise UserError("no round has all its traces yet", store.uri, f"Run {command('distill', '--run', store.uri)} first")
        store.check_policy(store.latest_policy())
        target, rows = Files(out_uri), 0
        there = [name for name in target.names("") if name.startswith("round-") and name.endswith(".parquet")]
        if there and not replace:
            raise UserError(f"{len(there)} rounds are there already", out_uri, "Name another folder, or pass --replace")
        for name in there:
            if name not in {f"round-{work.number:04d}.parquet" for work in rounds}:
                target.delete(name)
        with late("export", f"{len(rounds)} rounds of {store.uri} have been joined for {NOTICE_S:g} s so far."):
            for work in rounds:
                table, sink = joined_round(work), pa.BufferOutputStream()
                pq.write_table(table, sink, compression="zstd")
                target.write(f"round-{work.number:04d}.parquet", sink.getvalue())
                rows += table.num_rows
        out.told.result = {"out": out_uri, "rounds": [work.number for work in rounds], "traces": rows}
        out.say(f"{rows} traces of {len(rounds)} rounds in {out_uri}")
