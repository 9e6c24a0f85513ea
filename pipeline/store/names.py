"""Names of files and folders in a run: what a name may be, and the patterns by which listings know what belongs to a run.

Other files, such as `.DS_Store`, `notes.txt` or `0000 (1).json`, match no pattern. Listings pass them over.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from pipeline.errors import StoreError

SOURCES, MODELS, PASS_RATES = "sources.json", "models.json", "pass_rates.json"
MOST = 200  # characters; file systems allow 255 bytes
NUMBER = re.compile(r"\d{4}|[1-9]\d{4,8}")
SHARD = re.compile(r"\d{4,12}")
ENTRY = re.compile(r"(?P<shard>\d{4,12})\.json")
DATA = re.compile(r"(?P<shard>\d{4,12})-[0-9a-f]{12}\.parquet")
REPLACED = re.compile(r"(?P<number>\d{4}|[1-9]\d{4,8})\.replaced-[0-9a-f]{8}")
METRICS_FILE = re.compile(r"(?P<number>\d{4,9})-(?P<writer>[a-z_]{1,40})\.jsonl")
ASK = re.compile(r"(?P<id>[0-9a-f]{32})\.ask\.json")
EVALUATION_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*-[0-9a-f]{8}")


def plain(name: str) -> str:
    """`name` when it names a file in its own folder. Raises ValueError for a separator, `..`, control characters and the like."""
    if name in ("", ".", "..") or len(name) > MOST or not name.isprintable() or "/" in name or "\\" in name:
        raise ValueError("is no plain name of a file, which has no folder, no `..` and no control characters")
    return name


def inside(path: str) -> str:
    """`path` when each of its parts is a plain name, so that it stays inside the run. "" is the run's folder itself.

    Raises StoreError for another path. Every read, write, listing and deletion of a run passes through here.
    """
    try:
        for part in path.split("/") if path else ():
            plain(part)
    except ValueError as error:
        remedy = "A file of this run names it: `egrsd verify` says which. Restore that file from a copy"
        raise StoreError(f"a part of the path {error}", repr(path[:MOST]), remedy) from None
    return path


Plain = Annotated[str, AfterValidator(plain)]
