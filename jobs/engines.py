"""The engines of a verb: the run's pool, or its two, up for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipeline.store import control
from pipeline.store.directory import Store

if TYPE_CHECKING:
    from actors.member import EngineClass
    from actors.pool import EnginePool
    from actors.resources import Demand
    from pipeline.config import Run


@contextlib.contextmanager
def open_engines(
    run: Run, engine_class: EngineClass | None = None, store: Store | None = None, beside: Sequence[Demand] = ()
) -> Iterator[dict[str, EnginePool]]:
    """The run's pool, or its two, by stage; closed at the end of the block. `engine_class`: vLLM's engine unless given.

    With `store`, `egrsd scale` reaches them meanwhile; `beside` is what else the run asks of the cluster at the same time.
    """
    from actors.engine import Engine
    from actors.pool import EnginePool, rescale

    with contextlib.ExitStack() as stack:
        pools: dict[str, EnginePool] = {}
        for name, settings in (("rollout", run.engines.rollout), ("score", run.engines.score)):
            if settings is not None:
                inflight = run.engines.inflight_shards
                pool = EnginePool.start(name, run.model, settings, run.score, engine_class or Engine, inflight)
                stack.callback(pool.close)
                pools[name] = pool

        def answer(question: control.Document) -> control.Document:
            """Hold to the sizes that `egrsd scale` asks for, and tell how the pools are."""
            return {"pools": {name: asdict(found) for name, found in rescale(pools, question["sizes"], beside).items()}}

        if store is not None:
            stack.enter_context(control.answering(store, answer))
        yield {"rollout": pools["rollout"], "score": pools.get("score", pools["rollout"])}
