"""The engine pools of a verb, which are up for the length of a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

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
    run: Run, engine_class: EngineClass | None = None, store: Store | None = None, beside: Sequence[Demand] = ()
) -> Iterator[dict[str, EnginePool]]:
    """The pools of the stages `rollout` and `score`, closed at the end of the block. One pool may serve both.

    The pool of a teacher of its own is there as `teachers.<name>`. `engine_class` answers instead of vLLM in tests. With `store`,
    `egrsd scale` can reach the pools during the block. `beside` is what else the run asks of the cluster at the
    same time. Raises ResourceError when the cluster can never hold the engines.
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
        own = {f"teachers.{name}": pool for name, pool in pools.items() if name in run.teachers}
        only = pools.get("rollout") or pools["score"]
        yield {name: pools.get(name, only) for name in ("rollout", "score")} | own
