"""The engine pools of a verb, which are up for the length of a `with` block."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from actors.inference.engine import Engine
from actors.inference.teacher import teacher_engine
from actors.pool.member import EngineClass, seeing
from actors.resources import ASKING, Demand, placement_of, pools_of
from pipeline.config import Run
from pipeline.live import control
from pipeline.store.directory import Store

if TYPE_CHECKING:
    from actors.pool.pool import EnginePool


@contextlib.contextmanager
def open_engines(
    run: Run,
    engine_class: EngineClass | None = None,
    store: Store | None = None,
    beside: Sequence[Demand] = (),
    say: Callable[[str], None] | None = None,
    asking: Collection[str] = ASKING,
) -> Iterator[dict[str, EnginePool]]:
    """The pools of the stages `rollout` and `score`, closed at the end of the block. One pool may serve both.

    The pool of a teacher of its own is there as `teachers.<name>`. `asking`: the parts of the run, of ASKING, whose pools are
    opened. `engine_class` answers instead of vLLM in tests. `say` is told how far the first engine of each pool is, until it has
    answered.

    With `store`, the folder of the lease, `egrsd scale` can reach the pools during the block. No engine starts on a node
    that does not see it. `beside` is what else the run asks of the cluster at the same time.

    Pools with the largest engines start first, since smaller ones would take parts of their nodes. Raises ResourceError when the
    cluster can never hold the engines.
    """
    from actors.pool.pool import EnginePool, rescale  # imports Ray

    with contextlib.ExitStack() as stack:
        pools: dict[str, EnginePool] = {}
        chosen = pools_of(run, asking)
        for name, settings in sorted(chosen, key=lambda one: placement_of(one[1]).gpus, reverse=True):
            model, kind = run.model, engine_class or Engine
            if (teacher := run.teachers.get(name)) is not None:
                model, kind = run.model_of(teacher), teacher_engine(name, teacher, engine_class)
            kind = partial(seeing, store, kind) if store is not None else kind
            pool = EnginePool.start(name, model, settings, run.score, kind, run.engines.inflight_shards)
            stack.callback(pool.close)
            pools[name] = pool
            if placement_of(settings).gpus > 1:
                _await_places(pool, settings.min)
        pools = {name: pools[name] for name, _ in chosen}

        def answer(question: control.Document) -> control.Document:
            """Give the pools the sizes that `egrsd scale` asks for, and return the status of each."""
            return {"pools": {name: asdict(status) for name, status in rescale(pools, question["sizes"], beside).items()}}

        if store is not None:
            stack.enter_context(control.answering(store, answer))
        if say is not None:
            stack.enter_context(_told(pools, say))
        own = {f"teachers.{name}": pool for name, pool in pools.items() if name in run.teachers}
        only = pools.get("rollout") or pools["score"]
        yield {name: pools.get(name, only) for name in ("rollout", "score")} | own


LOOK_S = 0.5
PLACES_S = 60.0  # for the engines of one pool, until the next one asks for its own


class Overseen(Protocol):
    """A pool of engines that tells its state."""

    def overview(self) -> Any:
        """Its engines, as actors.pool.member.PoolStatus has them."""
        ...


def _await_places(pool: Overseen, count: int) -> None:
    """Wait until Ray has placed so many engines of a pool, for a minute at most."""
    deadline = time.monotonic() + PLACES_S
    while time.monotonic() < deadline:
        now = pool.overview()
        if now.gone or sum(engine.pid > 0 for engine in now.engines) >= count:
            return
        time.sleep(LOOK_S)


@contextlib.contextmanager
def _told(pools: Mapping[str, Overseen], say: Callable[[str], None]) -> Iterator[None]:
    """Tell how far the first engine of each pool is, from a thread of its own, for the length of a block."""
    stop = threading.Event()
    thread = threading.Thread(target=tell_starts, args=(dict(pools), say, stop), name="egrsd-starts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5 * LOOK_S)


def tell_starts(pools: dict[str, Overseen], say: Callable[[str], None], stop: threading.Event) -> None:
    """Tell each phase of the first engine of each pool once, with the seconds since the start, until it has answered."""
    begun, told = time.monotonic(), set[tuple[str, str]]()
    while pools and not stop.is_set():
        for name in list(pools):
            try:
                engines = pools[name].overview().engines
            except Exception:  # the pool has ended, which whoever works with it tells
                del pools[name]
                continue
            phase = _phase(engines)
            if phase and (name, phase) not in told:
                told.add((name, phase))
                say(f"engines.{name}: {phase}, {time.monotonic() - begun:.1f} s since the start of the pool")
            if any(engine.rows for engine in engines):
                del pools[name]
        stop.wait(LOOK_S)


def _phase(engines: list[Any]) -> str:
    """What the engine that is furthest does, in words."""
    if not engines:
        return ""
    if any(engine.rows for engine in engines):
        return "the first answers are there"
    serving = sum(engine.state in ("serving", "draining") for engine in engines)
    if serving:
        return "an engine serves, and works on its first answers"
    return max((engine.phase for engine in engines), key=bool) or "a process is being started"
