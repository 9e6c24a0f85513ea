"""Runs stages over the shards of a round. Missing and stale shards are computed and committed, and no others.

A few shards are computed in this process (`in_process.py`), and more than `shards_here` in tasks of Ray Data (`in_tasks.py`).

One execution streams all shards of a round through a chain of stages. A shard moves on as soon as it is committed, so one shard
is graded while an engine still writes another. A round has two chains. MEASURE ends with the columns that training reads. LABELS
needs the round's largest entropy, so it starts after MEASURE, while the trainer is already at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from pipeline.config import Run
from pipeline.contract import PooledEngines, Usage
from pipeline.errors import from_data
from pipeline.problems.sources import ProblemSet
from pipeline.rounds import seats
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round, problems_digest
from pipeline.rounds.running import in_process
from pipeline.rounds.running.shard import Item
from pipeline.stages import STAGES
from pipeline.store.manifest import SUMMARISED_FROM, Entry

_PROBLEMS_HERE = 4096  # that this process reads for a long round: some seconds, and each task would load a tokenizer for them
_LEAST_ENGINES = 8  # engines that a round always has enough shards in flight for


@dataclass(frozen=True)
class Choice:
    """The shards to bring up to date: those in `only`, or all when it is None. `force` also computes fresh ones."""

    only: frozenset[str] | None = None
    force: bool = False

    def has(self, shard: str) -> bool:
        """Whether `shard` is one of the chosen."""
        return self.only is None or shard in self.only


EVERY_SHARD = Choice()


def pools_of(engines: Mapping[str, PooledEngines]) -> list[PooledEngines]:
    """The pools behind the stages: one, or one each for rollout and scoring."""
    return list({id(pool): pool for pool in engines.values()}.values())


def usage(engines: Mapping[str, PooledEngines]) -> Usage:
    """What engines have done so far, over all pools."""
    pools = [pool.usage() for pool in pools_of(engines)]
    most = max((pool.most for pool in pools), default=0)
    busy = {name: engines for pool in pools for name, engines in pool.busy_s.items()}
    return Usage(busy, sum(pool.idle_s for pool in pools), most)


def inflight(run: Run, engines: Mapping[str, PooledEngines]) -> int:
    """Shards that may wait on engines at one time.

    They are enough for the most engines that the pools may have now, and for at least 8. `egrsd scale` may add engines while
    the stages run.
    """
    return run.engines.inflight_shards * max(_LEAST_ENGINES, usage(engines).most)


def execute(
    work: Round,
    chain: tuple[str, ...],
    source: ProblemSet | None = None,
    *,
    choice: Choice = EVERY_SHARD,
    inflight: int = 4,
    on_entry: Callable[[Entry, bool], None] = lambda *_: None,
) -> None:
    """Bring the stages of `chain` up to date for the chosen shards.

    source: the open problems, which the first stage needs.
    inflight: most shards that wait on engines at one time.
    on_entry(entry, computed): called for every entry. `computed` is False when the shard was fresh.

    Raises the stage's own error, and not Ray's wrapping of it.
    """
    inventory, missing, first = Inventory(work), [], 0
    if STAGES[chain[0]].after_round:
        work = replace(work, scope=inventory.scope)
    for shard, indices in work.shards.items():
        if choice.has(shard) and (choice.force or not _fresh(inventory, chain, shard, source)):
            missing.append({"shard": shard, "first": first, "indices": indices if source else [], "entries": [], "error": None})
        else:
            for entry in filter(None, (inventory.entry(name, shard) for name in chain)):
                on_entry(entry, False)
        first += len(indices)
    del inventory
    if missing and any(STAGES[name].where == "engines" for name in chain):
        work.store.check_policy(work.policy_version)
        seats.prepare(work)
    named, computes = {name: dict[str, str]() for name in chain}, bool(missing)  # Ray Data empties the list
    for item in _stream(work, chain, source, missing, choice.force, inflight) if missing else ():
        if item["error"]:
            raise from_data(item["error"])
        for document, computed in item["entries"]:
            entry = Entry(**document)
            named[entry.stage][entry.shard] = entry.data
            on_entry(entry, computed)
    for name in chain:
        if computes:
            work.store.tidy(work.area, name, named[name])
        if len(work.shards) >= SUMMARISED_FROM:
            work.store.summarise(work.area, name)


def _fresh(inventory: Inventory, chain: tuple[str, ...], shard: str, source: ProblemSet | None) -> bool:
    """Whether a chain has nothing to do for a shard. The source is read only when everything else is fresh."""
    if any(inventory.why_stale(STAGES[name], shard) is not None for name in chain):
        return False
    reading = [STAGES[name] for name in chain if not STAGES[name].reads]
    if source is None or not reading:
        return True
    digest = problems_digest(source.rows(inventory.work.shards[shard]))
    return all(inventory.why_stale(stage, shard, digest) is None for stage in reading)


def takes_ray(run: Run, chain: tuple[str, ...], num_shards: int) -> bool:
    """Whether bringing so many shards through a chain takes Ray: for engines, or for tasks that compute."""
    return num_shards > run.shards_here or any(STAGES[name].where == "engines" and STAGES[name].asks(run) for name in chain)


def _stream(
    work: Round, chain: tuple[str, ...], source: ProblemSet | None, items: list[Item], force: bool, inflight: int
) -> Iterator[Item]:
    """Each item after it went through the chain, with the entries of its shard, or with its error."""
    here = work.run.shards_here
    if len(items) <= here:
        yield from in_process.stream(work, chain, source, items, force, inflight)
        return
    reading = tuple(name for name in chain if not STAGES[name].reads)
    if here and reading and sum(len(item["indices"]) for item in items) <= _PROBLEMS_HERE:
        read = in_process.stream(work, reading, source, items, force, 1)
        items, source = sorted(read, key=lambda item: item["first"]), None
        chain = tuple(name for name in chain if name not in reading)
    if not chain:
        yield from items
        return
    from pipeline.rounds.running import in_tasks  # imports Ray, which a few shards do without

    yield from in_tasks.stream(work, chain, source, items, force, inflight)


class Computed:
    """The shards that executions have computed, for metrics: `count` is their `on_entry`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, dict[str, int]] = {}  # by stage and shard

    def count(self, entry: Entry, computed: bool) -> None:
        """Count one shard, unless it was fresh."""
        if computed:
            self._seconds[entry.stage] = self._seconds.get(entry.stage, 0.0) + entry.seconds
            self._tokens.setdefault(entry.stage, {})[entry.shard] = entry.tokens

    def figures(self, work: Round) -> dict[str, float]:
        """Seconds of each stage, and the tokens of the traces if all of them were written and scored here, else 0."""
        traces, scores = (self._tokens.get(name, {}) for name in ("rollout", "score"))
        tokens = sum(traces.values()) if traces.keys() & scores.keys() >= work.shards.keys() else 0
        return {"tokens_measured": float(tokens)} | {f"seconds_stage_{name}": spent for name, spent in self._seconds.items()}
