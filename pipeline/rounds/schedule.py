"""The stages as Ray Data executions over shards: what is missing or stale is computed and committed, the rest is left alone.

One execution streams every shard of a round through a chain of stages; each shard moves on as soon as it is committed, so one
shard is graded while another is still being written. Two chains make a round: MEASURE ends with what training reads; LABELS
needs the round's largest entropy, hence all of MEASURE, and runs while the trainer is already at work.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.contract import Place, Shard, Stage
from pipeline.errors import EgrsdError, StoreError, from_data, to_data
from pipeline.problems.sources import Problem, ProblemSet
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round, problems_digest
from pipeline.stages import STAGES
from pipeline.store.manifest import SUMMARISED_FROM, Entry, Origin

_MIN_TASKS, _MAX_THREADS = 4, 32
_ROWS, _MAX_GROUP = 512, 16  # a block costs the driver some 3 ms: long rounds have groups of shards for rows
_MAX_TURNS = 4


@dataclass(frozen=True)
class Cut:
    """How many shards travel and wait together.

    `group` shards make a row of the dataset; `tasks` engine tasks hold `rows` of them each, `threads` shards of them at an
    engine at one time. A waiting shard costs a thread, not a process of a hundred megabytes: 64 engines with 4 shards each are
    256 threads in 8 processes. Four shards are four tasks of one, so that a small round's rows do not share an interpreter.
    """

    group: int
    tasks: int
    threads: int
    rows: int

    @classmethod
    def of(cls, num_shards: int, inflight: int) -> Cut:
        """For a round of `num_shards` of which `inflight` may wait on engines."""
        inflight = min(inflight, max(1, num_shards))
        tasks = min(inflight, max(_MIN_TASKS, -(-inflight // _MAX_THREADS)))
        threads = -(-inflight // tasks)
        group = min(_MAX_GROUP, max(1, num_shards // _ROWS))
        # A task ends with its slowest shard: in a long round it gets several per thread, so that it seldom does.
        held = threads * min(_MAX_TURNS, max(1, num_shards // (4 * inflight)))
        return cls(group, tasks, threads, -(-held // group))


@dataclass(frozen=True)
class Choice:
    """Which shards to bring up to date: those in `only` (None: all); with `force` also those that are fresh."""

    only: frozenset[str] | None = None
    force: bool = False

    def has(self, shard: str) -> bool:
        """Whether a shard was chosen."""
        return self.only is None or shard in self.only


EVERY_SHARD = Choice()


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

    `on_entry(entry, computed)` is called with the entries, fresh and old, as shards get done. `inflight` bounds the shards that
    wait on engines at one time. Raises the stage's own error, not Ray's wrapping of it.
    """
    seen, missing, first = Inventory(work), [], 0
    if STAGES[chain[0]].after_round:
        work = replace(work, scope=seen.scope)
    for shard, indices in work.shards.items():
        if choice.has(shard) and (choice.force or not _fresh(seen, chain, shard, source)):
            missing.append({"shard": shard, "first": first, "indices": indices if source else [], "entries": [], "error": None})
        else:
            for entry in filter(None, (seen.entry(name, shard) for name in chain)):
                on_entry(entry, False)
        first += len(indices)
    del seen
    if missing and any(STAGES[name].where == "engines" for name in chain):
        work.store.check_policy(work.policy_version)
    named: dict[str, dict[str, str]] = {name: {} for name in chain}
    for item in _stream(work, chain, source, missing, choice.force, inflight) if missing else ():
        for document, computed in item["entries"]:
            entry = Entry(**document)
            named[entry.stage][entry.shard] = entry.data
            on_entry(entry, computed)
    for name in chain:
        if missing:
            work.store.tidy(work.area, name, named[name])
        if len(work.shards) >= SUMMARISED_FROM:
            work.store.summarise(work.area, name)


def _fresh(seen: Inventory, chain: tuple[str, ...], shard: str, source: ProblemSet | None) -> bool:
    """Whether a chain has nothing to do for a shard. The source's rows are only read where all else is fresh."""
    if any(seen.why_stale(STAGES[name], shard) is not None for name in chain):
        return False
    reading = [STAGES[name] for name in chain if not STAGES[name].reads]
    if source is None or not reading:
        return True
    digest = problems_digest(source.rows(seen.work.shards[shard]))
    return all(seen.why_stale(stage, shard, digest) is None for stage in reading)


def _stream(
    work: Round, chain: tuple[str, ...], source: ProblemSet | None, items: list[dict[str, Any]], force: bool, inflight: int
) -> Iterator[dict[str, Any]]:
    import ray.data

    quiet_ray_data()
    cut = Cut.of(len(items), inflight)
    rows = [{"shards": json.dumps(items[i : i + cut.group])} for i in range(0, len(items), cut.group)]
    items.clear()
    data: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    inside = replace(work, shards={})  # a task knows its shards by its rows: a round may have millions of problems
    for name in chain:
        on_engines = STAGES[name].where == "engines"
        data = data.map_batches(
            partial(_bring_rows_up_to_date, inside, name, None if STAGES[name].reads else source, force, cut),
            batch_size=cut.rows if on_engines else 1,
            batch_format="pyarrow",
            num_cpus=0.05 if on_engines else 1,
            compute=ray.data.TaskPoolStrategy(size=cut.tasks) if on_engines else None,
        )
    for row in data.iter_rows():
        for item in json.loads(row["shards"]):
            if item["error"]:
                raise from_data(item["error"])
            yield item


def _bring_rows_up_to_date(
    work: Round, name: str, source: ProblemSet | None, force: bool, cut: Cut, rows: pa.Table
) -> Iterator[pa.Table]:
    """Some shards through one stage, inside a Ray task; those that wait on engines `cut.threads` at a time.

    Groups leave in the order in which their shards came, each as soon as it is done. The order matters: Ray runs a task whose
    process died again, and skips as many of its rows as it already has.
    """
    items = [item for row in rows["shards"].to_pylist() for item in json.loads(row)]
    seen = Inventory(work, whole=False)
    with ThreadPoolExecutor(cut.threads if STAGES[name].where == "engines" else 1) as pool:
        done = pool.map(partial(_bring_item_up_to_date, seen, name, source, force), items)
        while some := list(itertools.islice(done, cut.group)):
            yield pa.table({"shards": [json.dumps(some)]})


def _bring_item_up_to_date(
    seen: Inventory, name: str, source: ProblemSet | None, force: bool, item: dict[str, Any]
) -> dict[str, Any]:
    """One shard through one stage. An error we understand travels as data: Ray keeps only its text."""
    if item["error"]:
        return item
    try:
        problems = source.rows(item["indices"]) if source is not None else None
        entry, computed = bring_up_to_date(seen, STAGES[name], item["shard"], item["first"], problems, force)
    except EgrsdError as error:
        return item | {"error": to_data(error)}
    return item | {"indices": [], "entries": [*item["entries"], [asdict(entry), computed]]}


def bring_up_to_date(
    seen: Inventory, stage: Stage, shard: str, first: int, problems: list[Problem] | None = None, force: bool = False
) -> tuple[Entry, bool]:
    """Compute and commit one shard of one stage unless it is fresh. Returns its entry and whether it was computed.

    `first` is the place of the shard's first prompt in the round. Raises StoreError when an input is missing or stale, and
    whatever the stage raises.
    """
    work = seen.work
    digest = problems_digest(problems) if problems is not None else None
    old = seen.entry(stage.name, shard)
    if old is not None and not force and seen.why_stale(stage, shard, digest) is None:
        return old, False
    inputs = seen.expected_inputs(stage, shard, digest)
    if inputs is None:
        needs = ", ".join(stage.inputs)
        raise StoreError(f"an input of stage {stage.name} is missing", f"{work.area}, shard {shard}", f"Run these first: {needs}")
    if reason := seen.stale_input(stage, shard):
        raise StoreError(
            f"an input of stage {stage.name} is stale: {reason}", f"{work.area}, shard {shard}", "Run that stage first"
        )
    start = time.perf_counter()
    made = stage.compute(_shard(seen, stage, shard, first, problems))
    origin = Origin(seen.settings(stage), inputs, time.perf_counter() - start, made.facts)
    entry = work.store.commit(work.area, stage, shard, made.table, origin)
    return entry, True


def _shard(seen: Inventory, stage: Stage, name: str, first: int, problems: list[Problem] | None) -> Shard:
    """What `stage` is given for one shard; `first` is the place of its first prompt in the round."""
    work = seen.work
    entries = {writer: entry for writer in stage.inputs if (entry := seen.entry(writer, name)) is not None}
    return Shard(
        run=work.run,
        name=name,
        place=Place(work.area, first, work.lag),
        tables={writer: work.store.read(entry, stage.reads_of(STAGES[writer])) for writer, entry in entries.items()},
        facts={writer: entry.facts for writer, entry in entries.items()},
        problems=problems,
        engines=work.engines.get(stage.name),
        policy=work.store.policy(work.policy_version) if stage.where == "engines" else None,
        baseline=work.baseline,
        scope=seen.scope if stage.after_round else None,
    )


def quiet_ray_data() -> None:
    """Ray Data without its progress bars and plan logs: the command line draws its own."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # nodes for engines and ranks are dear and may go: neither a task nor Ray Data's own wish for more CPUs is for them
    context.execution_options.label_selector = {"egrsd-role": "!in(rollout,train)"}
    context.target_max_block_size = 1  # a row leaves its task as soon as it is done, as a block of its own
    logging.getLogger("ray.data").setLevel(logging.ERROR)
