"""The engines of a verb: the run's pool, or its two, up for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actors.pool import EnginePool
    from actors.serving import EngineClass
    from pipeline.config import Run


@contextlib.contextmanager
def open_engines(run: Run, engine_class: EngineClass | None = None) -> Iterator[dict[str, EnginePool]]:
    """The run's pool, or its two, by stage; closed at the end of the block. `engine_class`: vLLM's engine unless given."""
    from actors.engine import Engine
    from actors.pool import EnginePool

    with contextlib.ExitStack() as stack:
        pools: dict[str, EnginePool] = {}
        for name, settings in (("rollout", run.engines.rollout), ("score", run.engines.score)):
            if settings is not None:
                inflight = run.engines.inflight_shards
                pool = EnginePool.start(name, run.model, settings, run.score, engine_class or Engine, inflight)
                stack.callback(pool.close)
                pools[name] = pool
        yield {"rollout": pools["rollout"], "score": pools.get("score", pools["rollout"])}
