"""Manifest entries, the names of data files, and the summary of a stage that has very many shards.

A summary is a cache of entries that needs no lock. A commit writes the new data file, then the entry, and then deletes the old
data file. Suppose that a listing shows exactly one data file for a shard, and the summary names this file. Then the summary's
entry was current when the listing was made. The entries of all other shards are read one by one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from typing_extensions import TypedDict

from pipeline.digest import short
from pipeline.errors import StoreError
from pipeline.store.documents import RESTORE, STRICT, Count, Seconds, Sha256, Text, parse
from pipeline.store.names import DATA, ENTRY, SHARD

SUMMARY = "summary"
SUMMARISED_FROM = 64  # shards of a stage; fewer entries are as fast to read one by one


class Facts(TypedDict, total=False):
    """Small results that later stages read without opening the shard. Which of them a shard has depends on its stage.

    The facts of the engine (contract.EngineFacts), `entropy_max` (largest teacher entropy of the shard, nats) and `peak` (that of
    the round, nats).
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)  # type: ignore[misc]

    engine: Text
    dtype: Text
    logprobs_mode: Text
    entropy_method: Text
    max_model_len: Annotated[int, Field(ge=1, lt=2**31)]
    vocab_size: Annotated[int, Field(ge=2, lt=2**31)]
    scoring: Text
    fallback: Text
    entropy_max: Annotated[float, Field(ge=-0.001, le=22)]  # log(2 ** 31) is 21.5
    peak: Annotated[float, Field(ge=-0.001, le=22)]
    gave_up: Count
    fell_back: Count


@checked(frozen=True, slots=True, config=STRICT)
class Entry:
    """Manifest entry of one shard of one stage.

    area: folder of the round or evaluation.
    data: name of the data file.
    tokens: response tokens in the shard.
    rejected: number of rows by reject_reason.
    settings, inputs, seconds, facts: as in Origin.
    """

    area: Annotated[str, Field(max_length=400)]
    stage: Annotated[str, Field(pattern="^[a-z]{1,20}$")]
    shard: Annotated[str, Field(pattern=f"^{SHARD.pattern}$")]
    data: Annotated[str, Field(pattern=DATA.pattern.replace("?P<shard>", ""))]
    rows: Count
    tokens: Count
    rejected: dict[Text, Count]
    bytes: Count
    sha256: Sha256
    settings: Text
    inputs: dict[Text, Text]
    seconds: Seconds
    facts: Facts = field(default_factory=Facts)  # type: ignore[assignment]

    @property
    def path(self) -> str:
        """The data file, in the run."""
        return f"{self.area}/{self.stage}/{self.data}"

    def fact(self, name: str) -> Any:
        """One fact. Raises StoreError when the shard lacks it, since it was not made by this stage or is damaged."""
        if name not in self.facts:
            where = f"{self.area}/{self.stage}/{self.shard}.json"
            raise StoreError(f"facts.{name}: is missing", where, RESTORE)
        return self.facts[name]  # type: ignore[literal-required]


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


def data_name(shard: str, sha256: str, origin: Origin) -> str:
    """The name of a data file. Two entries that differ in more than their seconds never name the same file."""
    text = json.dumps([sha256, origin.settings, origin.inputs, origin.facts], sort_keys=True)
    return f"{shard}-{short(text.encode(), 12)}.parquet"


def to_entry(data: bytes, where: str, path: str) -> Entry:
    """The entry in the JSON file at `path`, which must be where the entry says.

    Raises StoreError, with `where` for the file, for a damaged entry, or one of another round, stage or shard. It raises it too
    when settings, inputs, facts or sha256 are not those for which the data file was named.
    """
    entry = parse(Entry, data, where)
    if f"{entry.area}/{entry.stage}/{entry.shard}.json" != path:
        raise StoreError(f"belongs to {entry.area}/{entry.stage}, shard {entry.shard}: it was copied or renamed", where, RESTORE)
    if (wrong := _contradiction(entry)) is not None:
        raise StoreError(wrong, where, RESTORE)
    return entry


def _contradiction(entry: Entry) -> str | None:
    """What in an entry contradicts itself, or None."""
    if entry.data != data_name(entry.shard, entry.sha256, Origin(entry.settings, entry.inputs, facts=dict(entry.facts))):
        return "data: is not the name that sha256, settings, inputs and facts give: one of them was changed"
    if sum(entry.rejected.values()) > entry.rows:
        return f"rejected: has more than the {entry.rows} rows of the shard"
    return None


def to_summary(entries: Iterable[Entry]) -> bytes:
    """The content of a summary: the sha256 of the other lines, then one line of JSON for each entry."""
    lines = "\n".join(json.dumps(asdict(entry)) for entry in entries).encode()
    return hashlib.sha256(lines).hexdigest().encode() + b"\n" + lines


def survey(folder: str, names: list[str], summary: bytes) -> tuple[dict[str, Entry], list[str]]:
    """The entries of a summary that are proven to be current, and the shards whose entries must be read one by one.

    `names` is the listing of the stage's `folder`.
    """
    shards = [match["shard"] for name in names if (match := ENTRY.fullmatch(name))]
    files: dict[str, list[str]] = {}
    for name in names:
        if match := DATA.fullmatch(name):
            files.setdefault(match["shard"], []).append(name)
    summarised = _from_summary(summary, folder)
    known = {s: e for s in shards if (e := summarised.get(s)) is not None and files.get(s) == [e.data]}
    return known, [shard for shard in shards if shard not in known]


def _from_summary(summary: bytes, folder: str) -> dict[str, Entry]:
    """The entries of a summary by shard. An entry that is damaged is left out: it is then read on its own."""
    digest, _, lines = summary.partition(b"\n")
    if hashlib.sha256(lines).hexdigest().encode() != digest:
        return {}
    entries: dict[str, Entry] = {}
    for line in lines.splitlines():
        with contextlib.suppress(StoreError):
            entry = parse(Entry, line, SUMMARY)
            if f"{entry.area}/{entry.stage}" == folder and _contradiction(entry) is None:
                entries[entry.shard] = entry
    return entries
