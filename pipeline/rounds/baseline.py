"""The running reward state, which one round hands to the next. The running advantage estimator reads it. No Ray."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.config import Run
from pipeline.digest import digest
from pipeline.method.rewards import RunningBaseline
from pipeline.rounds.plan import read_plan
from pipeline.store.directory import Shard, Store, area
from pipeline.store.documents import Count, Digest, Document, Sha256


class State(Document):
    """The running reward state as in method.rewards.RunningBaseline."""

    count: Count
    mean: float
    m2: Annotated[float, Field(ge=0)]
    steps: Count


class Kept(Document):
    """baseline.json: hashes of the grades of a round and of the state before them, and the state after them."""

    grade: dict[Shard, Sha256]
    before: Digest
    after: State


def read_kept(store: Store, number: int) -> Kept | None:
    """The reward state that is on file after a round, or None. Raises StoreError for a damaged file."""
    return store.read_document(f"{area('rounds', number)}/baseline.json", Kept)


def baselines(store: Store, run: Run, keep: bool = False, trust: bool = True) -> Iterator[RunningBaseline]:
    """The running reward state at the start of round 0, 1, and so on: the rewards of all earlier rounds, folded in order.

    The state after a round is on file in its `baseline.json`. It is folded again when the round's grades or the state before them
    changed, or without `trust`. Only the driver of the run writes the file, with `keep`. With the group estimator the iterator is
    empty.
    """
    if run.grade.advantage != "running":
        return
    state = RunningBaseline()
    for number in itertools.count():
        yield state
        where, plan = area("rounds", number), read_plan(store, "rounds", number)
        planned = plan.shards if plan is not None else {}
        entries = {shard: entry for shard, entry in store.entries(where, "grade").items() if shard in planned}
        hashes, before = {shard: entry.sha256 for shard, entry in entries.items()}, digest(state.to_dict())
        kept = read_kept(store, number)
        if kept is None or not trust or kept.grade != hashes or kept.before != before:
            rewards = [store.read(entries[shard], ["reward"])["reward"] for shard in sorted(entries)]
            merged = pc.drop_null(pa.chunked_array([c for r in rewards for c in r.chunks], pa.float32()))
            kept = Kept(grade=hashes, before=before, after=State(**state.update(merged.to_numpy()).to_dict()))
            if entries and keep:
                store.write_json(f"{where}/baseline.json", kept.model_dump())
        state = RunningBaseline.from_dict(kept.after.model_dump())


def baseline_at(store: Store, run: Run, kind: str, number: int, keep: bool = False) -> RunningBaseline | None:
    """The running reward state at the start of a round. None with the group estimator.

    An evaluation has an empty state: it trains nothing.
    """
    if run.grade.advantage != "running":
        return None
    return next(itertools.islice(baselines(store, run, keep), number, None)) if kind == "rounds" else RunningBaseline()
