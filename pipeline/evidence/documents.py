"""The figures of sweeps, audits and evaluations as a run keeps them: plain JSON, which the report reads without a trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.digest import digest
from pipeline.errors import StoreError, first_line
from pipeline.evidence.intervals import Estimate
from pipeline.rounds.rows import are_of_now
from pipeline.stages.tables import views
from pipeline.store.directory import Store
from pipeline.store.documents import Count, Digest, Document, Number, Text, parse
from pipeline.store.names import EVALUATION_FOLDER

EVIDENCE = "evidence/sweep.json"
MEASURED = b"measured"  # in the metadata of the column of alignments
DIGITS = 6  # significant digits of the figures in the file
REMEDY = "Delete the file and run `egrsd sweep` again"
Figure = int | float | None


def plain(value: Any, digits: int | None = None) -> Any:
    """`value` as plain JSON data. A number that is not finite becomes null, an array a list, and a record an object.

    With `digits`, every float is rounded to that many significant digits.
    """
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): plain(part, digits) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(part, digits) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value


# ---- sweeps ------------------------------------------------------------------------------------------------------------


class Deciles(Document):
    """Figures by decile of the teacher's entropy."""

    tokens: list[Count]
    entropy: list[Figure]
    delta: list[Figure]


class SweptPoint(Document):
    """Figures of one point of the grid, as the page and the tables show them."""

    settings: dict[Text, bool | Figure | Text]
    cosine: list[Figure]
    cosine_mean: Figure = None
    factors: list[Figure]
    restored: list[Figure]
    shares: list[Figure]
    gates: list[Figure]
    decile_gates: list[Figure]
    decile_factors: list[Figure]
    kept: Figure
    effective_share: Figure
    effective_tokens: Figure
    correlation: Figure


class Evidence(Document):
    """evidence/sweep.json. `digest` is the hash of all the rest; earlier versions wrote none.

    measured: `Inventory.measured` of each round, by number. Earlier versions wrote none.
    """

    digest: Digest | None = None
    measured: dict[Text, Digest] = Field(default_factory=dict)
    axes: dict[Text, list[bool | Figure | Text]]
    points: list[SweptPoint]
    deciles: Deciles
    regimes: list[Text]
    rounds: list[Number]
    tokens: Count
    traces: Count


def write_evidence(store: Store, document: dict[str, Any]) -> None:
    """Store the figures of a sweep, with their hash."""
    store.write_json(EVIDENCE, document | {"digest": digest(json.loads(json.dumps(document)))})


def read_evidence(store: Store) -> dict[str, Any] | None:
    """The document evidence/sweep.json of a run, or None. A file of an earlier version gets the means that it lacks."""
    data = store.read_bytes(EVIDENCE)
    if data is None:
        return None
    found = parse(Evidence, data, store.locate(EVIDENCE), REMEDY)
    if found.digest is not None and found.digest != digest({k: v for k, v in json.loads(data).items() if k != "digest"}):
        raise StoreError("digest: is not that of the figures, which were changed", store.locate(EVIDENCE), REMEDY)
    document = found.model_dump(exclude_unset=True)
    points = [{"cosine_mean": plain(mean_of(point["cosine"]), DIGITS)} | point for point in document["points"]]
    return document | {"points": points}


def mean_of(cosines: list[float | None]) -> float:
    """Mean of the cosines that are numbers. NaN when there is none."""
    known = [value for value in cosines if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


# ---- audits ------------------------------------------------------------------------------------------------------------


def path_of(number: int, kind: str) -> str:
    """Where the audit of a round is kept, `json` or `parquet`."""
    return f"evidence/audit-{number:04d}.{kind}"


Shown = dict[Text, Number | float | None] | None


class Classes(Document):
    """Shares by regime and decile: of the tokens, and by name of each weighting with an interval. labels: of a tiny world."""

    regimes: list[Text]
    regime: dict[Text, list[Any]]
    decile: dict[Text, list[Any]] = Field(default_factory=dict)
    each: dict[Text, list[dict[Text, Shown]]] = Field(default_factory=dict)  # an earlier version wrote none
    labels: dict[str, Any] | None = None


class Weighting(Document):
    """Figures of one weighting, as the page shows them."""

    name: Text
    cosine: Shown
    batch_cosine: Shown
    batch_share: Shown
    averaged_cosine: Shown = None  # an earlier version wrote none of these
    push: Shown = None
    longer: Shown = None
    adamw: Shown = None
    difference: dict[Text, Shown]


class Audit(Document):
    """evidence/audit-NNNN.json, as far as the page shows it."""

    round: Number
    policy: Number
    traces: Count
    problems: Count
    blocks: Count
    points: list[Weighting]
    classes: Classes
    measured: Digest | None = None  # `Inventory.measured` of the round; earlier versions wrote none


def read_audit(store: Store, number: int) -> dict[str, Any] | None:
    """The stored audit of a round, or None. Raises StoreError for a file that holds no audit."""
    document = store.read_document(path_of(number, "json"), Audit, "Delete the file and run `egrsd audit` again")
    return None if document is None else document.model_dump()


def is_of_now(document: dict[str, Any], measured: Mapping[int, str]) -> bool:
    """Whether a sweep or an audit read the rounds as they are now: their `Inventory.measured` by number.

    Documents of earlier versions do not say it, and are trusted. So is what they say of rounds that are not among these.
    """
    said = document.get("measured") or {}
    found = said if isinstance(said, dict) else {str(document["round"]): said}
    return all(found.get(str(number), now) == now for number, now in measured.items())


def read_alignment(store: Store, number: int, measured: str) -> dict[str, np.ndarray]:
    """The alignment of every token of the audited traces of a round, by trace id. Empty without an audit.

    measured: `Inventory.measured` of the round. An audit of other traces has none for these.

    Raises StoreError for a file that holds no such column, and for values that are not finite.
    """
    path, remedy = path_of(number, "parquet"), "Delete the file and run `egrsd audit` again"
    data = store.read_bytes(path)
    if data is None:
        return {}
    try:
        table = pq.read_table(pa.BufferReader(data), columns=["trace_id", "alignment"])
        table.validate(full=True)
        values = views(table["alignment"])
        of_others = (table.schema.metadata or {}).get(MEASURED, measured.encode()) != measured.encode()
    except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise StoreError(f"holds no alignment of tokens ({first_line(error)})", store.locate(path), remedy) from error
    if not all(one.dtype == np.float32 and np.isfinite(one).all() for one in values):
        raise StoreError("alignment: must be finite numbers", store.locate(path), remedy)
    return {} if of_others else dict(zip(table["trace_id"].to_pylist(), values, strict=True))


def write_audit(store: Store, number: int, document: dict[str, Any], table: pa.Table) -> None:
    """Keep an audit in the run, in place of an earlier one of the same round."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({MEASURED: document["measured"]}), sink, compression="zstd")
    store.write(path_of(number, "parquet"), sink.getvalue().to_pybytes())
    store.write_json(path_of(number, "json"), document)


class _Policy(Document):
    """What a summary.json says of one policy."""

    figures: dict[str, Any]


class _Summary(Document):
    """The parts of a summary.json that a model card shows."""

    source: dict[str, Any]
    problems: Count
    samples: Count
    policies: dict[str, _Policy] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def sampling(self) -> str:
        """How the answers were sampled, such as ` (T 1, top-k 1)`. Empty in a file that does not say so."""
        known = [(name, self.settings.get(key)) for name, key in (("T", "temperature"), ("top-p", "top_p"), ("top-k", "top_k"))]
        if not all(isinstance(value, int | float) for _, value in known):
            return ""
        return f" ({', '.join(f'{name} {value:g}' for name, value in known)})"


def asked(store: Store, version: int) -> list[str]:
    """What `egrsd evaluate` found of this policy: a line without an end for each source, and each sampling of it."""
    lines = []
    for folder in store.named("evals", EVALUATION_FOLDER):
        summary = store.read_document(f"evals/{folder[0]}/summary.json", _Summary)
        if summary is None or str(version) not in summary.policies:
            continue
        if not are_of_now(store, version, store.entries(f"evals/{folder[0]}/{version:04d}", "rollout").values()):
            continue
        avg = summary.policies[str(version)].figures.get("avg")
        numbers = [avg.get(name) for name in ("value", "low", "high")] if isinstance(avg, dict) else []
        bounds = [float(number) for number in numbers if isinstance(number, int | float)]
        if len(bounds) == 3:
            what = f"{summary.problems} problems x {summary.samples} samples of {summary.source.get('uri')}{summary.sampling}"
            lines.append(f"{what}: accuracy {Estimate(*bounds).text(100.0)} %")
    return lines
