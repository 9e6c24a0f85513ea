"""Manifest entries, the names of data files, and the summary of a stage that has very many shards.

A summary is a cache of entries that needs no lock. A commit writes the new data file, then the entry, and then deletes the old
data file. Suppose that a listing shows exactly one data file for a shard, and the summary names this file. Then the summary's
entry was current when the listing was made. The entries of all other shards are read one by one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pipeline.digest import short

SUMMARY = "summary"
SUMMARISED_FROM = 64  # shards of a stage; fewer entries are as fast to read one by one


@dataclass(frozen=True, slots=True)
class Entry:
    """Manifest entry of one shard of one stage.

    area: folder of the round or evaluation.
    data: name of the data file.
    tokens: response tokens in the shard.
    rejected: number of rows by reject_reason.
    settings, inputs, seconds, facts: as in Origin.
    """

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
    """How a shard was made.

    settings: digest of the settings that its stage reads.
    inputs: hash of each input, by name.
    seconds: time of the computation.
    facts: small results that later stages read without opening the shard.
    """

    settings: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


ENTRY_FIELDS = tuple(f.name for f in fields(Entry))


def data_name(shard: str, sha256: str, origin: Origin) -> str:
    """The name of a data file. Two entries that differ in more than their seconds never name the same file."""
    text = json.dumps([sha256, origin.settings, origin.inputs, origin.facts], sort_keys=True)
    return f"{shard}-{short(text.encode(), 12)}.parquet"


def to_summary(entries: Iterable[Entry]) -> bytes:
    """The content of a summary: the sha256 of the other lines, then one line of JSON for each entry."""
    lines = "\n".join(json.dumps(asdict(entry)) for entry in entries).encode()
    return hashlib.sha256(lines).hexdigest().encode() + b"\n" + lines


def survey(names: list[str], summary: bytes) -> tuple[dict[str, Entry], list[str]]:
    """The entries of a summary that are proven to be current, and the shards whose entries must be read one by one.

    `names` is the listing of the stage's folder.
    """
    shards = [name[:-5] for name in names if name.endswith(".json")]
    files: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(".parquet"):
            files.setdefault(name.rpartition("-")[0], []).append(name)
    summarised = _from_summary(summary)
    known = {s: e for s in shards if (e := summarised.get(s)) is not None and files.get(s) == [e.data]}
    return known, [shard for shard in shards if shard not in known]


def _from_summary(summary: bytes) -> dict[str, Entry]:
    """The entries of a summary by shard. Empty when it is damaged: the entries are then read one by one."""
    digest, _, lines = summary.partition(b"\n")
    if hashlib.sha256(lines).hexdigest().encode() != digest:
        return {}
    documents = (json.loads(line) for line in lines.splitlines())
    return {d["shard"]: Entry(**d) for d in documents if d.keys() == set(ENTRY_FIELDS)}
