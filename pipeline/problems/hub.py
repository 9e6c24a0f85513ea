"""Sources that the `datasets` library opens: a dataset of the hub, a folder of split files, or a `save_to_disk` folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Source
from pipeline.errors import SourceError, first_line
from pipeline.problems.parquet import hash_rows
from pipeline.problems.shape import LOOKED_AT, Look, Shape, as_written, carried, listed, understand, writable
from pipeline.problems.splits import check_split

OPTIONS = ("name", "data_dir", "data_files", "revision")  # those of `load_dataset` that source.options may set
_SAVED = ("state.json", "dataset_dict.json")  # one of them marks a folder that `save_to_disk` wrote


@dataclass(frozen=True)
class Hub:
    """Rows of a `datasets.Dataset`, which that library keeps on disk and maps into memory."""

    data: Any
    fingerprint: str
    total: int
    shape: Shape

    def __len__(self) -> int:
        return len(self.data)

    def carried(self) -> str:
        """Hash of the columns that are only carried, which `fingerprint` leaves out. Empty without such columns."""
        own, digest = set(self.shape.roots(self.data.column_names)), hashlib.sha256()
        columns = [name for name in self.data.column_names if name not in own]
        for table in self.data.select_columns(columns).with_format("arrow").iter(1024) if columns else ():
            hash_rows(digest, table)
        return digest.hexdigest()[:16] if columns else ""

    def read(self, indices: Sequence[int], others: bool = True) -> list[dict[str, Any]]:
        """Rows in the order asked. Raises SourceError for values that Python has none for."""
        data = self.data if others else self.data.select_columns(self.shape.roots(self.data.column_names))
        places = [int(i) for i in indices]
        try:
            columns = data[places]
        except (OverflowError, ValueError):
            listed(data.with_format("arrow")[places], "a data set of the hub")  # says which column
            raise
        rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
        return as_written(rows, data.features.arrow_schema)


def open_hub(source: Source, name: str, look: bool = True) -> Hub:
    """The first `source.size` rows of split `source.split`. `name` is a hub name or a local folder.

    Raises SourceError when the dataset cannot be loaded, lacks a column or is empty.
    """
    data = _load(source, name)
    if len(data) == 0:
        raise SourceError("is empty", source.uri, "A split with at least one row is expected")
    plain, digest, total = writable(data.features.arrow_schema), hashlib.sha256(), len(data)
    first = listed(data.select_columns(plain).select(range(min(total, LOOKED_AT))).with_format("arrow")[:], source.uri)
    shape = carried(plain, understand(source, Look(names := data.column_names, first, source.uri), look), source, source.uri)
    data = data.select(range(min(total, source.size)))
    for table in data.select_columns(shape.roots(names)).with_format("arrow").iter(1024):
        hash_rows(digest, table)
    return Hub(data.select_columns(shape.columns(names)), digest.hexdigest()[:16], total, shape)


def is_saved(name: str) -> bool:
    """Whether a local folder was written by `save_to_disk`."""
    return any((Path(name) / mark).is_file() for mark in _SAVED)


def _saved(source: Source, data: Any) -> Any:
    """The asked split of a folder that `save_to_disk` wrote. Raises SourceError that lists the splits that are there."""
    if isinstance(data, dict):
        check_split(source, source.split, data)
        return data[source.split]
    if data.split is not None:
        check_split(source, source.split, [str(data.split)])
    return data


def _load(source: Source, name: str) -> Any:
    import datasets

    if not name.strip() or Path(name).is_file():
        what = f"'{name}' is a file, not a dataset" if name.strip() else "names no dataset"
        raise SourceError(what, source.uri, "Give a file without `datasets:`, or the name of a dataset or folder behind it")
    try:
        if is_saved(name):
            return _saved(source, datasets.load_from_disk(name))
        return datasets.load_dataset(name, split=source.split, **source.options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(
            f"cannot be loaded: {first_line(error)}",
            f"{source.uri}, split '{source.split}'",
            "Check name and split; offline (HF_HUB_OFFLINE=1) only a local folder or the cache can be read",
        ) from error
