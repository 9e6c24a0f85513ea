"""A run directory whose rounds are put there whole: the real Store but for where a round's rows come from."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store import Store, area
from pipeline.training.batches import Round


class TableStore(Store):
    """Rounds lie as one Parquet file each, so that a test needs no engine; policies, state and metrics are the real thing."""

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return TableStore, (self.uri,)

    def put(self, data: Round) -> None:
        """Commit a round."""
        sink = pa.BufferOutputStream()
        pq.write_table(data.table, sink)
        self.write(f"{area('rounds', data.number)}/table.parquet", sink.getvalue())
        self.write_json(f"{area('rounds', data.number)}/ready.json", {})

    def round_table(self, number: int) -> pa.Table | None:
        if self.ready(number) is None:
            return None
        return pq.read_table(pa.BufferReader(self.read_bytes(f"{area('rounds', number)}/table.parquet")))
