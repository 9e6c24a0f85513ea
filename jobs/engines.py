"""The engine pools of a verb, which are up for the length of a `with` block."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from actors.inference.engine import Engine
from actors.inference.teacher import teacher_engine
from actors.pool.member import EngineClass
from actors.resources import Demand, pools_of
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
) -> Iterator[dict[str, EnginePool]]:
    """The pools of the stages `rollout` and `score`, closed at the end of the block. One pool may serve both.

    The pool of a teacher of its own is there as `teachers.<name>`. `engine_class` answers instead of vLLM in tests. With `store`,
    `egrsd scale` can reach the pools during the block. `beside` is what else the run asks of the cluster at the
    same time. `say` is told how far the first engine of each pool is, until it has answered. Raises ResourceError when the
    cluster can never hold the engines.
    """
    from actors.pool.pool import EnginePool, rescale  # imports Ray

    with contextlib.ExitStack() as stack:
        pools: dict[str, EnginePool] = {}
        for name, settings in pools_of(run):
            model, kind = run.model, engine_class or Engine
            if (teacher := run.teachers.get(name)) is not None:
                model, kind = run.model_of(teacher), teacher_engine(name, teacher, engine_class)
            pool = EnginePool.start(name, model, settings, run.score, kind, run.engines.inflight_shards)
            stack.callback(pool.close)
            pools[name] = pool

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


class Overseen(Protocol):
    """A pool of engines that tells its state."""

    def overview(self) -> Any:
        """Its engines, as actors.pool.member.PoolStatus has them."""
        ...


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
