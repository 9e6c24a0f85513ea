"""Manifest entries: what is known of a shard, how its data file is called, and the summary of a stage that has very many.

A summary needs no lock and no order of its own. A commit puts the new data file, then the entry, then drops the old data file;
so a listing of the folder that shows for a shard exactly the data file which the summary names proves that its entry was the
summary's when the listing was made. Any other shard's entry is read by itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

SUMMARY = "summary"
SUMMARISED_FROM = 64  # shards of a stage: fewer entries are as quickly read one by one


@dataclass(frozen=True, slots=True)
class Entry:
    """Manifest entry of one shard of one stage. `inputs` maps what the shard was made from to its hash; `rejected` counts
    rows by reason; `facts` are small results that later stages need without opening the shard."""

    area: str
    stage: str
    shard: str
    data: str
    rows: int
    tokens: int
    rejected: dict[str, int]
    bytes: int
    sha256: str
    settings: str
    inputs: dict[str, str]
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Origin:
    """How a shard came to be. `settings`: digest of the stage's settings; `inputs`: hash of each thing it was made from;
    `seconds`: time of the computation; `facts`: small results that later stages need without opening the shard."""

    settings: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


ENTRY_FIELDS = tuple(f.name for f in fields(Entry))


def data_name(shard: str, sha256: str, origin: Origin) -> str:
    """What a data file is called: two entries that differ in more than their seconds never name the same file."""
    told = json.dumps([sha256, origin.settings, origin.inputs, origin.facts], sort_keys=True)
    return f"{shard}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.parquet"


def to_summary(entries: Iterable[Entry]) -> bytes:
    """The summary of a stage: a hash of the lines that follow it, an entry each."""
    lines = "\n".join(json.dumps(asdict(entry)) for entry in entries).encode()
    return hashlib.sha256(lines).hexdigest().encode() + b"\n" + lines


def survey(names: list[str], summary: bytes) -> tuple[dict[str, Entry], list[str]]:
    """Of a stage whose folder holds `names`: entries that its summary is proven to have right, and the shards whose entries must
    be read."""
    shards = [name[:-5] for name in names if name.endswith(".json")]
    files: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(".parquet"):
            files.setdefault(name.rpartition("-")[0], []).append(name)
    told = _from_summary(summary)
    known = {s: e for s in shards if (e := told.get(s)) is not None and files.get(s) == [e.data]}
    return known, [shard for shard in shards if shard not in known]


def _from_summary(summary: bytes) -> dict[str, Entry]:
    """What a summary says; nothing where it is damaged, since the entries themselves are there."""
    digest, _, lines = summary.partition(b"\n")
    if hashlib.sha256(lines).hexdigest().encode() != digest:
        return {}
    documents = (json.loads(line) for line in lines.splitlines())
    return {d["shard"]: Entry(**d) for d in documents if d.keys() == set(ENTRY_FIELDS)}
