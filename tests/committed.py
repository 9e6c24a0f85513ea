"""What training reads of a committed round, as one table."""

from __future__ import annotations

import pyarrow as pa

from pipeline.rounds.rows import joined, shard_tables
from pipeline.store.directory import Store


def round_table(store: Store, number: int) -> pa.Table | None:
    """Training rows of a committed round, one per trace in shard order. None while the round is not committed."""
    ready = store.ready(number)
    return None if ready is None else joined(list(shard_tables(store, number, ready)))
