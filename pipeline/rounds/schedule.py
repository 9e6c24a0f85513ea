"""Runs stages over the shards of a round. Missing and stale shards are computed and committed, and no others.

A few shards are computed in this process (`in_process.py`). Tasks of Ray Data compute more than `shards_here` of them.

One execution streams all shards of a round through a chain of stages. A shard moves on as soon as it is committed, so one shard
is graded while an engine still writes another. A round has two chains. MEASURE ends with the columns that training reads. LABELS
needs the round's largest entropy, so it starts after MEASURE, while the trainer is already at work.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from uuid import uuid4

import pyarrow as pa

from pipeline.config import Run
from pipeline.contract import PooledEngines, Usage
from pipeline.errors import EgrsdError, from_data, to_data
from pipeline.fit import builds
from pipeline.fit.machine import processors
from pipeline.models.tokenizers.tokenizer import keep_tokenizer, loaded_tokenizer
from pipeline.problems.sources import ProblemSet
from pipeline.rounds import frozen, in_process, seats
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round, problems_digest
from pipeline.rounds.shard import Item, bring_item
from pipeline.stages import STAGES
from pipeline.store.manifest import SUMMARISED_FROM, Entry

_MIN_TASKS, _MAX_THREADS = 4, 32
_ROWS, _MAX_GROUP = 512, 16  # a block costs the driver some 3 ms, so a row of a long round is a group of shards
_MAX_TURNS = 4
_PROBLEMS_HERE = 4096  # that this process reads for a long round: some seconds, and each task would load a tokenizer for them
_LEAST_ENGINES = 8  # engines that a round always has enough shards in flight for


@dataclass(frozen=True)
class Cut:
    """How the shards of a round are spread over Ray tasks and threads.

    group: shards in one row of the dataset.
    tasks: tasks that wait on engines at one time.
    threads: shards of one task that wait on engines at one time.
    rows: rows of the dataset that one task takes.

    A waiting shard costs a thread, and not a process of some hundred megabytes that takes 6 processor seconds to start. 64
    engines with 4 shards each are 256 threads in 8 processes. Up to four shards have a task each, so that the
    shards of a small round do not share an interpreter. There are never more such tasks than the driver's machine has processors.
    """

    group: int
    tasks: int
    threads: int
    rows: int

    @classmethod
    def of(cls, num_shards: int, inflight: int, cpus: int) -> Cut:
        """The cut for `num_shards` shards, of which `inflight` may wait on engines at one time. `cpus`: of this machine."""
        inflight = min(inflight, max(1, num_shards))
        tasks = min(inflight, max(min(_MIN_TASKS, cpus), -(-inflight // _MAX_THREADS)))
        threads = -(-inflight // tasks)
        group = min(_MAX_GROUP, max(1, num_shards // _ROWS))
        # A task ends with its slowest shard. In a long round each thread takes several shards, so that it waits less often.
        held = threads * min(_MAX_TURNS, max(1, num_shards // (4 * inflight)))
        return cls(group, tasks, threads, -(-held // group))


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
    return Usage(sum(pool.busiest_s for pool in pools), sum(pool.idle_s for pool in pools), most)


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
    named: dict[str, dict[str, str]] = {name: {} for name in chain}
    for item in _stream(work, chain, source, missing, choice.force, inflight) if missing else ():
        if item["error"]:
            raise from_data(item["error"])
        for document, computed in item["entries"]:
            entry = Entry(**document)
            named[entry.stage][entry.shard] = entry.data
            on_entry(entry, computed)
    for name in chain:
        if missing:
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
    yield from _stream_in_tasks(work, chain, source, items, force, inflight) if chain else items


def _stream_in_tasks(
    work: Round, chain: tuple[str, ...], source: ProblemSet | None, items: list[Item], force: bool, inflight: int
) -> Iterator[Item]:
    """The same as `in_process.stream`, as one execution of Ray Data."""
    import ray.data

    quiet_ray_data()
    cut = Cut.of(len(items), inflight, processors())
    rows = [{"shards": json.dumps(items[i : i + cut.group])} for i in range(0, len(items), cut.group)]
    items.clear()
    data: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    mark = f"_{uuid4().hex[:8]}"  # in the titles of the processes that run this execution's tasks
    # a task reads its shards from its rows: the plan of a round may have millions of problems
    inside = replace(work, shards={}, tokenizer=loaded_tokenizer(work.run.model))
    for name in chain:
        on_engines = STAGES[name].where == "engines"
        data = data.map_batches(
            _titled(mark, partial(_bring_rows_up_to_date, inside, name, None if STAGES[name].reads else source, force, cut)),
            batch_size=cut.rows if on_engines else 1,
            batch_format="pyarrow",
            num_cpus=0.05 if on_engines else 1,
            compute=ray.data.TaskPoolStrategy(size=cut.tasks if on_engines else _most_on_cpus(len(rows))),
        )
    with frozen.Watch(mark, work.run.stall_timeout_s):
        for row in data.iter_rows():
            yield from json.loads(row["shards"])


def _most_on_cpus(rows: int) -> int | None:
    """Tasks of a CPU stage at one time; None: as many as find a CPU. A Ray on one machine counts more CPUs than there are."""
    import ray

    return None if sum(node["Alive"] for node in ray.nodes()) > 1 else min(rows, processors())


def _titled(mark: str, work: Callable[[pa.Table], Iterator[pa.Table]]) -> Callable[[pa.Table], Iterator[pa.Table]]:
    """`work` under a name that ends with `mark`. Ray gives a process the name of what it runs as its title."""

    def bring(rows: pa.Table) -> Iterator[pa.Table]:
        """Do the work."""
        yield from work(rows)

    bring.__name__ = f"_bring_rows_up_to_date{mark}"
    return bring


def _bring_rows_up_to_date(
    work: Round, name: str, source: ProblemSet | None, force: bool, cut: Cut, rows: pa.Table
) -> Iterator[pa.Table]:
    """Bring some shards up to date in one stage, inside a Ray task. At most `cut.threads` of them wait on engines at one time.

    Groups leave the task in the order in which they came, each as soon as it is done. The order matters. When a task's process
    dies, Ray runs the task again and skips as many rows as it already has.
    """
    if work.tokenizer is not None:
        keep_tokenizer(work.run.model, work.tokenizer)
    items = [item for row in rows["shards"].to_pylist() for item in json.loads(row)]
    inventory = Inventory(work, whole=False)
    with ThreadPoolExecutor(cut.threads if STAGES[name].where == "engines" else 1) as pool:
        done = pool.map(partial(_bring_item_up_to_date, inventory, name, source, force), items)
        while some := list(itertools.islice(done, cut.group)):
            yield pa.table({"shards": [json.dumps(some)]})


def _bring_item_up_to_date(inventory: Inventory, name: str, source: ProblemSet | None, force: bool, item: Item) -> Item:
    """Bring one shard up to date in one stage, in a process of Ray that has the driver's code."""
    try:
        builds.check()
    except EgrsdError as error:
        return item if item["error"] else item | {"error": to_data(error)}
    return bring_item(inventory, name, source, force, item)


def quiet_ray_data() -> None:
    """Switch off the progress bars and logs of Ray Data, and keep its tasks off the nodes of engines and ranks."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # nodes for engines and ranks cost much and may vanish: no task runs there, and Ray Data asks for no more of them
    context.execution_options.label_selector = {"egrsd-role": "!in(rollout,train)"}
    context.target_max_block_size = 1  # each row is a block, and so leaves its task as soon as it is done
    logging.getLogger("ray.data").setLevel(logging.ERROR)
