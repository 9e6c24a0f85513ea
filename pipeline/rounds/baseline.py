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
    """baseline.json: hashes of the grades of a round and of the state before them, the state after them, and a hash of it all.

    Files of early versions have no `proof`.
    """

    grade: dict[Shard, Sha256]
    before: Digest
    after: State
    proof: Digest | None = None

    @classmethod
    def of(cls, grade: dict[str, str], before: str, after: RunningBaseline) -> Kept:
        """The document with its proof."""
        kept = cls(grade=grade, before=before, after=State(**after.to_dict()))
        return kept.model_copy(update={"proof": kept.hash()})

    def hash(self) -> str:
        """What `proof` must be."""
        return digest(self.model_dump(exclude={"proof"}))


def read_kept(store: Store, number: int) -> Kept | None:
    """The reward state that is on file after a round, or None. Raises StoreError for a damaged file."""
    return store.read_document(f"{area('rounds', number)}/baseline.json", Kept)


def baselines(store: Store, run: Run, keep: bool = False, trust: bool = True) -> Iterator[RunningBaseline]:
    """The running reward state at the start of round 0, 1, and so on: the rewards of all earlier rounds, folded in order.

    The state after a round is on file in its `baseline.json`. It is folded again when the round's grades or the state before them
    changed. It is also folded again when the file is not as it was written, or without `trust`. Only the driver of the run writes
    the file, with `keep`; it does not trust a file without proof. With the group estimator the iterator is empty.
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
        if kept is None or not trust or kept.grade != hashes or kept.before != before or not _is_whole(kept, keep):
            rewards = [store.read(entries[shard], ["reward"])["reward"] for shard in sorted(entries)]
            merged = pc.drop_null(pa.chunked_array([c for r in rewards for c in r.chunks], pa.float32()))
            kept = Kept.of(hashes, before, state.update(merged.to_numpy()))
            if entries and keep:
                store.write_json(f"{where}/baseline.json", kept.model_dump())
        state = RunningBaseline.from_dict(kept.after.model_dump())


def _is_whole(kept: Kept, proven: bool) -> bool:
    """Whether a document is as it was written. One without a proof is believed unless it must be `proven`."""
    return kept.proof == kept.hash() or (kept.proof is None and not proven)


def baseline_at(store: Store, run: Run, kind: str, number: int, keep: bool = False) -> RunningBaseline | None:
    """The running reward state at the start of a round. None with the group estimator.

    An evaluation has an empty state: it trains nothing.
    """
    if run.grade.advantage != "running":
        return None
    return next(itertools.islice(baselines(store, run, keep), number, None)) if kind == "rounds" else RunningBaseline()
