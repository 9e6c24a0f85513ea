"""plan.json: the problems of a round or an evaluation, their cut into shards, and the policy that must answer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.store.directory import Shard, Store, area
from pipeline.store.documents import STRICT, Count, Number, Text


@dataclass(frozen=True, config=STRICT)
class Plan:
    """What one round or evaluation consists of.

    policy: the version that must answer.
    shards: indices of the problems in their source, by shard.
    source: fingerprint of the source. None in plans of early versions.
    asked: prompts that were wanted; a small source may have fewer. None in plans of early versions.
    """

    policy: Number
    shards: dict[Shard, Annotated[list[Count], Field(min_length=1)]]
    source: Text | None = None
    asked: Count | None = None

    def is_for(self, num_prompts: int, source: str | None = None) -> bool:
        """Whether the plan was made for so many prompts of a source.

        source: fingerprint of the source. None while it is not open: then a plan without `asked` passes too.
        """
        if source is None:
            return self.asked in (None, num_prompts)
        return (self.asked, self.source) == (num_prompts, source)

    def asks_the_same(self, new: Plan) -> bool:
        """Whether a new plan has the same problems in the same order, and the same policy. Their cuts into shards may differ.

        A plan of an early version names no source; then the places in the source decide.
        """
        mine, its = ([i for indices in plan.shards.values() for i in indices] for plan in (self, new))
        return mine == its and self.policy == new.policy and self.source in (None, new.source)


def read_plan(store: Store, kind: str, number: int) -> Plan | None:
    """The plan of a round or an evaluation, or None when there is none. Raises StoreError for a file that is no plan.

    kind: "rounds", or the folder of an evaluation.
    """
    return store.read_document(_path(kind, number), Plan)


def write_plan(store: Store, kind: str, number: int, plan: Plan) -> None:
    """Store a plan, so that a rerun has the same shards. A file with the same plan is left alone."""
    if read_plan(store, kind, number) != plan:
        store.write_json(_path(kind, number), asdict(plan))


def cut(indices: list[int], size: int) -> dict[str, list[int]]:
    """Cut source indices into shards of `size` prompts. The names of the shards sort like numbers."""
    width = max(4, len(str(len(indices) // size)))
    return {f"{i // size:0{width}d}": indices[i : i + size] for i in range(0, len(indices), size)}


def _path(kind: str, number: int) -> str:
    return f"{area(kind, number)}/plan.json"
