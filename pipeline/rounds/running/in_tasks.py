"""Runs stages over many shards in tasks of Ray Data, on all machines of the cluster.

Shards that wait for engines share a process, each in a thread of its own. A shard that stops a task is done again by another.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from uuid import uuid4

import pyarrow as pa
import ray.data
from ray.data import DataContext

from pipeline.errors import EgrsdError, to_data
from pipeline.fit import builds
from pipeline.fit.machine import processors
from pipeline.models.tokenizers.tokenizer import keep_tokenizer, loaded_tokenizer
from pipeline.problems.sources import ProblemSet
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round
from pipeline.rounds.running import frozen
from pipeline.rounds.running.shard import Item, bring_item
from pipeline.stages import STAGES

_MIN_TASKS, _MAX_THREADS = 4, 32
_ROWS, _MAX_GROUP = 512, 16  # a block costs the driver some 3 ms, so a row of a long round is a group of shards
_MAX_TURNS = 4


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


def stream(
    work: Round, chain: tuple[str, ...], source: ProblemSet | None, items: list[Item], force: bool, inflight: int
) -> Iterator[Item]:
    """The same as `in_process.stream`, as one execution of Ray Data."""
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
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # nodes for engines and ranks cost much and may vanish: no task runs there, and Ray Data asks for no more of them
    context.execution_options.label_selector = {"egrsd-role": "!in(rollout,train)"}
    context.target_max_block_size = 1  # each row is a block, and so leaves its task as soon as it is done
    logging.getLogger("ray.data").setLevel(logging.ERROR)
