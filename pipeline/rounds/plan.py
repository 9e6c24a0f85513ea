"""plan.json: the problems of a round or an evaluation, their cut into shards, and the policy that must answer."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from pipeline.store.directory import Shard, Store, area
from pipeline.store.documents import STRICT, Count, Digest, Number, Text

_ALWAYS = ("policy", "shards", "source", "asked")  # the other keys are left out where they have no value
Rate = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class Chosen:
    """How pass rates decided which problems a round asks.

    settings: hash of the settings of the choice and of the pass rates of other runs.
    low, high: bounds of the pass rate. problems: of the source.
    below, above: problems that were left out since their pass rate is outside the bounds.
    unmeasured: problems without a known pass rate. kept: whether they were kept.
    """

    settings: Digest
    low: Rate
    high: Rate
    problems: Count
    below: Count
    above: Count
    unmeasured: Count
    kept: bool

    @property
    def left_out(self) -> int:
        """Problems that the round could not take."""
        return self.below + self.above + (0 if self.kept else self.unmeasured)


@dataclass(frozen=True, config=STRICT)
class Further:
    """Prompts that were asked in place of groups without signal: their number, and `Plan.end` after them."""

    prompts: Annotated[Count, Field(ge=1)]
    end: Count | None = None


@dataclass(frozen=True, config=STRICT)
class Filling:
    """How far a round has been filled with further prompts (rollout.fill_groups).

    most: further prompts that it may have. further: what was asked, in order; these are the last shards of the plan.
    full: whether nothing more is asked. The trainer takes no round that is not full.
    """

    most: Count
    further: list[Further]
    full: bool


@dataclass(frozen=True, config=STRICT)
class Plan:
    """What one round or evaluation consists of.

    policy: the version that must answer.
    shards: indices of the problems in their source, by shard.
    source: fingerprint of the source. None in plans of early versions.
    asked: prompts that were wanted; a small source may have fewer. None in plans of early versions.
    chosen: how pass rates chose the problems, or None. filling: how far the round is filled, or None.
    end: place in the endless shuffled order behind the problems that were asked first. None where it follows from the round.
    """

    policy: Number
    shards: dict[Shard, Annotated[list[Count], Field(min_length=1)]]
    source: Text | None = None
    asked: Count | None = None
    chosen: Chosen | None = None
    filling: Filling | None = None
    end: Count | None = None

    @model_validator(mode="after")
    def _further_fits(self) -> Plan:
        ends = list(itertools.accumulate(map(len, self.shards.values())))
        for place in range(len(self.further)):
            if ends[-1] - sum(part.prompts for part in self.further[place:]) not in ends:
                raise ValueError(f"filling.further.{place}: its prompts are no whole shards behind the others")
        return self

    def is_for(self, num_prompts: int, source: str | None = None) -> bool:
        """Whether the plan was made for so many prompts of a source.

        source: fingerprint of the source. None while it is not open: then a plan without `asked` passes too.
        """
        if source is None:
            return self.asked in (None, num_prompts)
        return (self.asked, self.source) == (num_prompts, source)

    def asks_the_same(self, new: Plan) -> bool:
        """Whether a new plan has the same problems in the same order, and the same policy. Their cuts into shards may differ.

        A plan of an early version names no source; then the places in the source decide. Further prompts are not compared.
        """
        mine, its = (plan.before(0).problems for plan in (self, new))
        return mine == its and self.policy == new.policy and self.source in (None, new.source)

    @property
    def problems(self) -> list[int]:
        """Indices of all problems, in order."""
        return [index for indices in self.shards.values() for index in indices]

    @property
    def further(self) -> list[Further]:
        """The further prompts that were asked, in order."""
        return [] if self.filling is None else self.filling.further

    def before(self, place: int) -> Plan:
        """The plan as it was before further prompts were asked for the time number `place`, from 0. It was not full then."""
        if self.filling is None:
            return self
        size = sum(map(len, self.shards.values())) - sum(part.prompts for part in self.further[place:])
        ends = itertools.accumulate(map(len, self.shards.values()))
        kept = {shard: rows for (shard, rows), end in zip(self.shards.items(), ends, strict=True) if end <= size}
        return replace(self, shards=kept, filling=Filling(self.filling.most, self.further[:place], full=False))

    def with_further(self, shards: dict[str, list[int]], end: int | None) -> Plan:
        """The plan with further prompts behind its own. `end` as in Further."""
        assert self.filling is not None
        part = Further(sum(map(len, shards.values())), end)
        return replace(self, shards=self.shards | shards, filling=Filling(self.filling.most, [*self.further, part], full=False))


def read_plan(store: Store, kind: str, number: int) -> Plan | None:
    """The plan of a round or an evaluation, or None when there is none. Raises StoreError for a file that is no plan.

    kind: "rounds", or the folder of an evaluation.
    """
    return store.read_document(_path(kind, number), Plan)


def write_plan(store: Store, kind: str, number: int, plan: Plan) -> None:
    """Store a plan, so that a rerun has the same shards. A file with the same plan is left alone."""
    if read_plan(store, kind, number) != plan:
        store.write_json(_path(kind, number), {name: v for name, v in asdict(plan).items() if v is not None or name in _ALWAYS})


def cut(indices: list[int], size: int, first: int = 0, width: int = 4) -> dict[str, list[int]]:
    """Cut source indices into shards of `size` prompts. Their names, from number `first` on, sort like numbers.

    width: least digits of a name. A round whose plan may grow needs as many from the start.
    """
    width = max(width, len(str(len(indices) // size)))
    return {f"{first + i // size:0{width}d}": indices[i : i + size] for i in range(0, len(indices), size)}


def _path(kind: str, number: int) -> str:
    return f"{area(kind, number)}/plan.json"
