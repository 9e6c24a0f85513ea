"""plan.json: which problems a round or an evaluation has, how they are cut into shards, and which policy must answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pipeline.store.directory import Store, area


@dataclass(frozen=True)
class Plan:
    """policy: the version that must answer; shards: shard to source indices; source: the problems' fingerprint; asked: prompts
    that were wanted (a small source may have fewer). The last two are None in plans of early versions."""

    policy: int
    shards: dict[str, list[int]]
    source: str | None = None
    asked: int | None = None


def read_plan(store: Store, kind: str, number: int) -> Plan | None:
    """The plan of a round ("rounds") or an evaluation; None where there is none. Raises StoreError for a file that is no plan."""
    found = store.read_json(_path(kind, number), "policy", "shards")
    return None if found is None else Plan(found["policy"], found["shards"], found.get("source"), found.get("asked"))


def write_plan(store: Store, kind: str, number: int, plan: Plan) -> None:
    """Keep a plan, so that a rerun meets the same shards; a file that says the same already is left alone."""
    document = asdict(plan)
    if store.read_json(_path(kind, number)) != document:
        store.write_json(_path(kind, number), document)


def cut(indices: list[int], size: int) -> dict[str, list[int]]:
    """Source indices as shards of `size` prompts, whose names sort like numbers."""
    width = max(4, len(str(len(indices) // size)))
    return {f"{i // size:0{width}d}": indices[i : i + size] for i in range(0, len(indices), size)}


def _path(kind: str, number: int) -> str:
    return f"{area(kind, number)}/plan.json"
