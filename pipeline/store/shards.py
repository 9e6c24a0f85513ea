"""A shard as a table: its check against the contract, its counts, and its bytes as a Parquet file."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import contract
from pipeline.errors import ContractError


def check_table(stage: contract.Stage, table: pa.Table) -> int:
    """Check a table against the contract, and return the number of its response tokens.

    The schema must be as declared, and trace ids must be unique. Rows that are not rejected must be complete, with finite floats
    and `[T]` lists of equal length. Raises ContractError that names stage and column.
    """
    expected = contract.schema(stage)
    if table.schema.remove_metadata() != expected:
        raise ContractError(f"schema is {table.schema.remove_metadata()}, expected {expected}", f"stage {stage.name}")
    # a prompt may come twice, from a source that is smaller than a round; a trace may not
    if stage.key == "trace_id" and pc.count_distinct(table["trace_id"]).as_py() != table.num_rows:
        raise ContractError("keys are not unique", f"stage {stage.name}, column {stage.key}")
    live = table.filter(pc.is_null(table["reject_reason"]))
    lengths: pa.ChunkedArray | None = None
    for column in stage.writes:
        values = live[column.name]
        where = f"stage {stage.name}, column {column.name}"
        if values.null_count and not column.nullable:
            raise ContractError("null in a row that was not rejected", where)
        flat = values.combine_chunks().flatten() if column.shape else values
        if pa.types.is_floating(flat.type) and pc.any(pc.invert(pc.is_finite(flat))).as_py():
            raise ContractError("not finite", where)
        if column.shape == "T":
            here = pc.list_value_length(values)
            if lengths is not None and not here.equals(lengths):
                raise ContractError("lists of response tokens differ in length", where)
            lengths = here
    return int(pc.sum(lengths).as_py() or 0) if lengths is not None else 0


def count_rejected(table: pa.Table) -> dict[str, int]:
    """Number of rejected rows by reject_reason."""
    counts = pc.value_counts(pc.drop_null(table["reject_reason"]).combine_chunks())
    return {item["values"]: item["counts"] for item in counts.to_pylist()}


def to_parquet(stage: contract.Stage, table: pa.Table) -> pa.Buffer:
    """The table as one Parquet file. The same rows give the same bytes, since no time and no writer is stored.

    The compression is lz4: on nested floats zstd costs a third of the speed and saves little.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="lz4", use_dictionary=_repetitive(stage))
    return sink.getvalue()


def _repetitive(stage: contract.Stage) -> list[str]:
    """Columns whose values repeat enough for a dictionary. Log-probs and entropies do not."""
    return [c.name for c in stage.writes if pa.types.is_string(c.type)]
