"""A shard as a table: its check against the contract, its counts, and its bytes as a Parquet file.

The same check is made before a shard is committed and whenever it is read.
"""

from __future__ import annotations

from math import isfinite

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import contract
from pipeline.errors import ContractError, first_line
from pipeline.store.manifest import Entry
from pipeline.store.possible import CHOICES, HOLDS, columns_of, key_of, limits, topk_fault, types_of


def check_table(stage: contract.Stage, table: pa.Table, vocab_size: int | None = None) -> int:
    """Check a table against the contract before it is committed, and return the number of its response tokens.

    The schema must be as declared, with or without the optional columns, and `check_columns` must pass. Raises ContractError
    that names stage and column.
    """
    expected = contract.schema(stage, table.column_names)
    if table.schema.remove_metadata() != expected:
        raise ContractError(f"schema is {table.schema.remove_metadata()}, expected {expected}", f"stage {stage.name}")
    try:
        return check_columns(stage.name, table, vocab_size) or 0
    except ContractError as error:
        raise ContractError(error.what, f"stage {stage.name}, {error.where}") from error


def check_columns(writer: str, table: pa.Table, vocab_size: int | None = None) -> int | None:
    """Check the columns of stage `writer` that `table` has, among them its key and reject_reason.

    Keys of traces are unique. Rows that are not rejected are complete, with possible values (possible.limits) and `[T]` lists of
    equal length. Returns the number of response tokens, or None without a `[T]` column. Raises ContractError with the column.
    """
    key = key_of(writer)
    # a prompt may come twice, from a source that is smaller than a round; a trace may not
    if table[key].null_count or (key == "trace_id" and pc.count_distinct(table[key]).as_py() != table.num_rows):
        raise ContractError("keys are not unique", f"column {key}")
    reasons = table["reject_reason"]
    _check_choices("reject_reason", pc.drop_null(reasons))
    live = table if reasons.null_count == len(reasons) else table.filter(pc.is_null(reasons))
    lengths: pa.ChunkedArray | None = None
    for column in (*columns_of(writer), *_single_rewards(writer, table.column_names)):
        if column.name not in table.column_names:
            continue
        values = live[column.name]
        unknown = _check_unknown(column, live)
        _check_values(column, values, vocab_size, unknown is not None)
        if column.shape.startswith("T"):
            here = pc.list_value_length(values)
            if unknown is not None:
                if lengths is None:
                    continue
                here = pc.if_else(unknown, lengths, here)
            if lengths is not None and not here.equals(lengths):
                raise ContractError("lists of response tokens differ in length", f"column {column.name}")
            lengths = here
    _check_topk(live)
    return None if lengths is None else int(pc.sum(lengths).as_py() or 0)


def _check_unknown(column: contract.Column, live: pa.Table) -> pa.ChunkedArray | None:
    """Which rows cannot have a value, by their trace_source. None when all rows have one.

    Raises ContractError when another row lacks a value, or when such a row has one.
    """
    if not column.unknown_for or "trace_source" not in live.column_names:
        return None
    unknown = pc.fill_null(pc.equal(live["trace_source"], column.unknown_for), False)
    if not pc.any(unknown).as_py():
        return None
    if not pc.is_null(live[column.name]).equals(unknown):
        raise ContractError(f"null in other rows than those of trace_source {column.unknown_for}", f"column {column.name}")
    return unknown


def _check_topk(live: pa.Table) -> None:
    """Raise ContractError for kept tokens that are no distribution's most likely ones, or differ in number."""
    kept = {name: live[name].combine_chunks().flatten() for name in contract.TOPK if name in live.column_names}
    sizes = {name: pc.unique(pc.list_value_length(rows)) for name, rows in kept.items()}
    for name, found in sizes.items():
        if len(found) > 1 or pc.min(found).as_py() == 0:
            raise ContractError(f"keeps {pc.min(found)} tokens at one position and {pc.max(found)} at another", f"column {name}")
    if len({found[0].as_py() for found in sizes.values() if len(found)}) > 1:
        raise ContractError("keeps another number of tokens than of log-probs", f"column {contract.TOPK[0]}")
    for name, rows in kept.items():
        if len(rows) and (wrong := topk_fault(name, rows.flatten().to_numpy().reshape(len(rows), -1))):
            raise ContractError(wrong, f"column {name}")


def _check_values(column: contract.Column, values: pa.ChunkedArray, vocab_size: int | None, unknown: bool) -> None:
    """Raise ContractError for a value that the column cannot have in a row that is not rejected.

    unknown: whether rows that cannot have a value are null.
    """
    where = f"column {column.name}"
    if values.null_count and not (column.nullable or unknown):
        raise ContractError("null in a row that was not rejected", where)
    flat = values.combine_chunks().flatten() if column.shape else values
    parts = flat.flatten() if column.shape == "S" else [flat.flatten()] if " " in column.shape else [flat]
    if column.shape and any(part.null_count for part in (flat, *parts)):
        raise ContractError("null within a list", where)
    floats = [_range(part) if pa.types.is_floating(part.type) else (0.0, 0.0) for part in parts]
    if not all(isfinite(bound) for bounds in floats for bound in bounds):
        raise ContractError("not finite", where)
    if column.name in HOLDS and len(parts[0]) > parts[0].null_count:
        low, high = limits(HOLDS[column.name], vocab_size)
        least, most = floats[0] if pa.types.is_floating(parts[0].type) else _range(parts[0])
        if least < low or most > high:
            raise ContractError(f"{least if least < low else most:g} is impossible: {low:g} to {high:g} are possible", where)
    _check_choices(column.name, flat)


def _range(values: pa.Array | pa.ChunkedArray) -> tuple[float, float]:
    """The least and the largest number of a column, nulls left out; (0, 0) for a column without numbers.

    One of them is NaN or infinite where a number is: numpy's minimum is NaN beside a NaN, and Arrow's is not.
    """
    numbers = (values.drop_null() if values.null_count else values).to_numpy()
    return (numbers.min().item(), numbers.max().item()) if len(numbers) else (0.0, 0.0)


def _check_choices(name: str, texts: pa.Array | pa.ChunkedArray) -> None:
    """Raise ContractError for a text that a column of fixed texts does not know."""
    choices = CHOICES.get(name)
    if choices and not set(texts.unique().to_pylist()) <= set(choices):  # an Arrow array of `choices` would import pandas
        raise ContractError(f"has other texts than {', '.join(choices)}", f"column {name}")


def from_parquet(entry: Entry, data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The shard that `data` holds, or some of its columns, after a check that it is what the entry and the contract say.

    Rows, rejected rows and size must be those of the entry, and `check_columns` must pass for the columns. Response tokens are
    counted when a `[T]` column is among them. An optional column that the shard lacks is left out. Raises ContractError; `where`
    names the part of the file.
    """
    types = types_of(entry.stage) | _types_of_rewards(entry.stage, data)
    written = {column.name: column for column in columns_of(entry.stage)}
    needed = list(dict.fromkeys([key_of(entry.stage), "reject_reason", *(types if columns is None else columns)]))
    if "trace_source" not in needed and any(name in written and written[name].unknown_for for name in needed):
        needed.append("trace_source")
    optional = {column.name for column in written.values() if column.optional}
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            stored = file.schema_arrow
            needed = [name for name in needed if name not in optional or name in stored.names]
            for name in needed:
                if len(stored.get_all_field_indices(name)) != 1:
                    raise ContractError("is missing, or there twice", f"column {name}")
                if stored.field(name).type != types[name]:
                    raise ContractError(f"is {stored.field(name).type}, expected {types[name]}", f"column {name}")
            table = file.read(columns=[name for name in stored.names if name in needed])
            table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ContractError(f"cannot be read ({first_line(error)})", "Parquet") from error
    tokens = check_columns(entry.stage, table, entry.facts.get("vocab_size"))
    counts = {"rows": table.num_rows, "rejected": count_rejected(table), "bytes": len(data)}
    for name, found in (counts | ({} if tokens is None else {"tokens": tokens})).items():
        if found != getattr(entry, name):
            raise ContractError(f"the file has {found}, its manifest entry {getattr(entry, name)}", name)
    return table if columns is None else table.select([name for name in columns if name in table.column_names])


def _single_rewards(writer: str, names: list[str]) -> list[contract.Column]:
    """The columns of single rewards among the columns of a shard. Only stage `reward` has them."""
    return contract.reward_columns(names) if writer == "reward" else []


def _types_of_rewards(writer: str, data: bytes) -> dict[str, pa.DataType]:
    """The types of the columns of single rewards, which only the file itself names. Empty for a file that is broken."""
    try:
        names = pq.read_schema(pa.BufferReader(data)).names if writer == "reward" else []
    except (pa.ArrowException, OSError, ValueError):
        return {}
    return {column.name: column.type for column in _single_rewards(writer, names)}


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
