"""What the control plane costs: many engines that take half a second a batch, many shards in a run directory, many calls.

    python -m tests.benchmarks.bench_control_plane --engines 1 4 16 64 --traces 1000000 --shards 100000

Efficiency is (batches x 0.5 s / engines) / wall time of the rollout stage: fakes answer one batch at a time, so more than 1 is
not to be had. Without arguments a short form, which is `make bench`'s.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from pipeline import contract
from pipeline.config import Run
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.recipes import demo
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import plan_round, with_engines
from pipeline.stages import PLAIN
from pipeline.store.directory import Entry, Store, area
from pipeline.store.manifest import Origin, data_name

BATCH_S, GROUP, PROMPTS_PER_SHARD = 0.5, 8, 4  # 32 traces a batch, of at most 8 tokens
LEAST_BATCHES = 120  # an engine: a minute, so that start and end do not count


def measure() -> dict[str, float]:
    """The short form: 16 engines for half a minute, a run of 5 000 shards, a dispatcher of 64 and of 1 000 engines."""
    engines = rollouts(16, 16 * 60)
    listed = listing(5_000)
    return {
        "efficiency_16_engines": engines["efficiency_between_tenths"],
        "driver_growth_mb": engines["driver_end_mb"] - engines["driver_begin_mb"],
        "own_cores": engines["own_cores"],
        "machine_cores": engines["machine_cores"],
        **listed,
        "summary_speedup": listed["list_stage_unsummarised_s"] / listed["list_stage_s"],
        "dispatcher_batches_64": dispatched(64),
        "dispatcher_batches_1000": dispatched(1000),
    }


# ---- engines -----------------------------------------------------------------------------------------------------------


def rollouts(engines: int, batches: int) -> dict[str, float]:
    """Wall time of a rollout stage of `batches` shards on `engines` fakes, and what it took: cores, memory."""
    with tempfile.TemporaryDirectory() as folder:
        code = "import json; from tests.benchmarks.bench_control_plane import _rollouts\n"
        code += f"print(json.dumps(_rollouts({engines}, {batches}, {folder!r})))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(done.stdout.splitlines()[-1])


def _rollouts(engines: int, batches: int, folder: str) -> dict[str, float]:
    import ray

    from actors.fakes import Behaviour, FakeEngine
    from actors.pool.pool import EnginePool
    from pipeline.rounds.running.schedule import execute

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    run = _run(batches, engines)
    source = open_source(run.source)
    work = plan_round(Store(f"{folder}/run"), run, "rounds", 0, 0, source)
    fake = partial(FakeEngine, behaviour=Behaviour(batch_s=BATCH_S, in_turn=True))
    pool = EnginePool.start("rollout", run.model, run.engines.rollout, run.score, fake, run.engines.inflight_shards)
    while sum(engine.state == "serving" for engine in pool.overview().engines) < engines:
        time.sleep(0.2)
    begun = time.perf_counter()
    execute(work, ("prompts",), source)  # also warms the processes of the tasks up
    prompts_s = time.perf_counter() - begun
    done: list[tuple[float, float]] = []
    driver, own, machine, begun = psutil.Process(), _own_cpu(), _machine_cpu(), time.perf_counter()
    execute(
        with_engines(work, {"rollout": pool}),
        ("rollout",),
        inflight=run.engines.inflight_shards * engines,
        on_entry=lambda *_: done.append((time.perf_counter(), driver.memory_info().rss / 2**20)),
    )
    wall = time.perf_counter() - begun
    shares = (_own_cpu() - own) / wall, (_machine_cpu() - machine) / wall
    processes = [p for p in driver.children(recursive=True) if "EngineActor" in " ".join(p.cmdline())]
    each = [p.memory_full_info().pss / 2**20 for p in processes]
    pool.close()
    ray.shutdown()
    early, late = done[len(done) // 10], done[len(done) * 9 // 10]
    return {
        "engines": engines,
        "batches": batches,
        "traces": batches * GROUP * PROMPTS_PER_SHARD,
        "prompts_s": prompts_s,
        "wall_s": wall,
        "efficiency": batches * BATCH_S / engines / wall,
        "own_cores": shares[0],
        "machine_cores": shares[1],
        "efficiency_between_tenths": 0.8 * batches * BATCH_S / engines / (late[0] - early[0]),
        "driver_begin_mb": early[1],
        "driver_end_mb": late[1],
        "engine_mb": sum(each) / max(1, len(each)),
    }


def _run(batches: int, engines: int) -> Run:
    from actors.fakes import UNWATCHED

    return resolve(
        demo(),
        [
            *UNWATCHED,
            f"rollout.prompts_per_round={batches * PROMPTS_PER_SHARD}",
            f"rollout.prompts_per_shard={PROMPTS_PER_SHARD}",
            f"rollout.group_size={GROUP}",
            "rollout.max_new_tokens=8",
            "engines.rollout.placement.cpus=0.01",
            f"engines.rollout.max={engines}",
            f"engines.rollout.min={engines}",
        ],
    )


def _own_cpu() -> float:
    """Seconds of CPU that this process and those it started have used."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _machine_cpu() -> float:
    times = psutil.cpu_times()
    return times.user + times.system + times.nice


# ---- the run directory -------------------------------------------------------------------------------------------------


def listing(shards: int, rounds: int = 1) -> dict[str, float]:
    """Seconds to list a stage and to show `egrsd status` of a run of `shards` in `rounds`, each with six stages."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"{folder}/run")
        generate(store, shards // rounds, rounds)
        where = area("rounds", 0)
        plain = _timed(lambda: store.entries(where, "score"))
        status_plain = _status(store)
        begun = time.perf_counter()
        for number in range(rounds):
            for stage in PLAIN:
                store.summarise(area("rounds", number), stage.name)
        written = time.perf_counter() - begun
        listed = _timed(lambda: store.entries(where, "score"))
        status = _status(store)
    return {
        "shards": float(shards),
        "list_stage_unsummarised_s": plain,
        "list_stage_s": listed,
        "status_unsummarised_s": status_plain["seconds"],
        "status_s": status["seconds"],
        "status_mb": status["mb"],
        "summaries_written_s": written,
    }


def generate(store: Store, shards: int, rounds: int) -> None:
    """A finished run whose data files are empty: entries that fit each other, as six stages would have left them."""
    run = _run(shards, 1).model_copy(update={"rounds": rounds})
    run = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"problems": 0})})
    store.save_run(run, {})
    source = open_source(run.source)
    for number in range(rounds):
        work = plan_round(store, run, "rounds", number, 0, source)
        seen = Inventory(dataclasses.replace(work, scope=contract.Scope(1.5, 57)))
        for stage in PLAIN:
            folder = Path(store.uri) / work.area / stage.name
            folder.mkdir(parents=True)
            seen._stages[stage.name] = {shard: _entry(seen, stage, shard) for shard in work.shards}
            for shard, entry in seen._stages[stage.name].items():
                (folder / f"{shard}.json").write_text(json.dumps(dataclasses.asdict(entry), indent=1))
                (folder / entry.data).touch()


def _entry(seen: Inventory, stage: contract.Stage, shard: str) -> Entry:
    sha256 = f"{hash((seen.work.number, stage.name, shard)) & (2**64 - 1):064x}"
    facts: dict[str, Any] = {"entropy_max": 1.5, "vocab_size": 57, "engine": "fake", "dtype": "float32", "peak": 1.5}
    origin = Origin(seen.settings(stage), seen.expected_inputs(stage, shard) or {}, 0.5, facts)
    numbers = (32, 400, {}, 9000, sha256, origin.settings, origin.inputs, origin.seconds, origin.facts)
    return Entry(seen.work.area, stage.name, shard, data_name(shard, sha256, origin), *numbers)


def _status(store: Store) -> dict[str, float]:
    """Wall seconds and peak memory of the command, in a process of its own."""
    code = "import resource, sys; from jobs.status import show; show(sys.argv[1], False)\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)"
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, store.uri], capture_output=True, text=True, check=True)
    assert "!" not in done.stdout.partition("cells:")[0], done.stdout  # nothing is stale
    return {"seconds": time.perf_counter() - begun, "mb": float(done.stderr.splitlines()[-1])}


def _timed(work: Any) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


# ---- the dispatcher ----------------------------------------------------------------------------------------------------


def dispatched(engines: int, inflight: int = 4, seconds: float = 3.0) -> float:
    """Batches that one dispatcher can hand out and take back in a second of CPU, in its own code alone: all engines full, as many
    callers waiting as there are engines, one batch after the other ends."""
    return asyncio.run(_dispatch(engines, inflight, seconds))


async def _dispatch(engines: int, inflight: int, seconds: float) -> float:
    from actors.pool.dispatcher import Dispatcher
    from actors.pool.member import Member

    run = _run(1, engines)
    load_args: Any = (None, run.model, run.engines.rollout, run.score)
    pool = Dispatcher("rollout", run.engines.rollout, inflight, load_args)
    pool._begin = lambda: None  # type: ignore[method-assign]  # its engines are given, none is to be started
    for number in range(engines):
        pool._members[str(number)] = member = Member(str(number), None, "serving")
        pool._ready.offer(member)
    held: asyncio.Queue[Any] = asyncio.Queue()

    async def caller() -> None:
        while True:
            held.put_nowait(await pool.acquire(32, 0, False))

    callers = [asyncio.create_task(caller()) for _ in range(engines)]
    count, begun = 0, time.process_time()
    while time.process_time() - begun < seconds:
        await pool.release((await held.get()).id, 32, 200)
        count += 1
        await asyncio.sleep(0)
    for task in callers:
        task.cancel()
    return count / (time.process_time() - begun)


def called(engines: int, threads: int = 16, seconds: float = 5.0) -> float:
    """Batches a second through a dispatcher actor as callers do it, acquire and release, its engines idle fakes."""
    from concurrent.futures import ThreadPoolExecutor

    import ray

    from actors.fakes import FakeEngine
    from actors.pool.pool import EnginePool

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    run = _run(1, engines)
    pool = EnginePool.start("rollout", run.model, run.engines.rollout, run.score, FakeEngine, 64)
    pool.facts()
    end = time.perf_counter() + seconds

    def ask(_: int) -> int:
        count = 0
        while time.perf_counter() < end:
            ticket = ray.get(pool._dispatcher.acquire.remote(32, 0, False))
            pool._dispatcher.release.remote(ticket.id, 32, 200)
            count += 1
        return count

    with ThreadPoolExecutor(threads) as callers:
        count = sum(callers.map(ask, range(threads)))
    pool.close()
    ray.shutdown()
    return count / seconds


def main() -> None:
    """The long form, a line of JSON per measurement."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engines", type=int, nargs="*", default=[])
    parser.add_argument("--traces", type=int, default=0, help="of the largest number of engines; fewer get a minute's worth")
    parser.add_argument("--shards", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dispatcher", type=int, nargs="*", default=[])
    asked = parser.parse_args()
    for engines in asked.engines:
        whole = asked.traces // (GROUP * PROMPTS_PER_SHARD) if engines == max(asked.engines) else 0
        _tell(rollouts(engines, max(whole, engines * LEAST_BATCHES)))
    if asked.shards:
        _tell(listing(asked.shards, asked.rounds))
    for engines in asked.dispatcher:
        _tell({"engines": engines, "dispatcher_batches_per_cpu_s": dispatched(engines)})
    if asked.dispatcher:
        _tell({"called_batches_per_s": called(1)})


def _tell(figures: dict[str, float]) -> None:
    rounded = {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps(rounded | {"load": os.getloadavg()[0]}), flush=True)


if __name__ == "__main__":
    main()
