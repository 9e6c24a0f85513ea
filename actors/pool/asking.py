"""What a dispatcher asks of Ray, and of one engine besides work: actors, a sign of life, and turns on a shared card."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import cluster, resources
from actors.pool.member import EngineActor, Member, PoolStatus, Pulse
from actors.pool.probe import Probed, difference
from pipeline import config
from pipeline.config.machines import Client
from pipeline.errors import first_line

log = logging.getLogger(__name__)

_DISPATCHER = "-pool"  # how the names of dispatchers end
_ANSWER_S = 10.0  # for another pool
PLACE_S = 3600.0  # until an autoscaler has found, started and set up a machine, which takes longer than the start of an engine
SLOW = "Raise start_timeout_s, or see what holds the resources"


async def pulse(member: Member, stall_timeout_s: float, gone: Callable[[], bool]) -> Pulse | None:
    """A sign of life of an engine, or None when none has come for `stall_timeout_s` seconds, or when the engine is `gone`.

    The seconds are counted while the dispatcher itself runs. A machine that stood still blames no engine.
    """
    asked: asyncio.Future[Pulse] = asyncio.ensure_future(member.handle.pulse.remote())
    part = min(1.0, stall_timeout_s / 4)
    while not (await asyncio.wait({asked}, timeout=part))[0]:
        member.silent_s += part
        if member.silent_s >= stall_timeout_s or gone():
            asked.cancel()
            return None
    member.silent_s = 0.0
    return asked.result()


async def placed(member: Member, patience_s: float, may_come: Callable[[], Awaitable[bool]]) -> int:
    """The process id of an engine, once Ray has placed it.

    Raises TimeoutError after `patience_s` seconds at whose beginning and end its place may not come. An engine that served, or
    held a place, until just now may have ended.
    """
    process: asyncio.Future[int] = asyncio.ensure_future(member.handle.pid.remote())
    may = await may_come()
    while not (await asyncio.wait({process}, timeout=patience_s))[0]:
        before, may = may, await may_come()
        if not (before or may):
            process.cancel()
            raise TimeoutError(f"an engine did not start within {patience_s:g} s: the cluster has no place for it")
    return process.result()


async def probed(member: Member, timeout_s: float) -> Probed:
    """What an engine answers to the probe. Raises RayError or TimeoutError when it does not answer."""
    return await asyncio.wait_for(member.handle.probe.remote(), timeout_s)


async def to_sleep(member: Member, timeout_s: float) -> bool:
    """Probe an engine and put it to sleep. False when it does not sleep, for whatever reason, and must end."""
    try:
        member.probed = await probed(member, timeout_s)
        return bool(await asyncio.wait_for(member.handle.sleep.remote(), timeout_s))
    except (RayError, TimeoutError) as error:
        log.warning("Engine %s does not sleep (%s): it is ended", member.name, _why(error))
        return False


async def to_wake(member: Member, dtype: str, timeout_s: float) -> str:
    """Wake an engine and probe it. Returns why it cannot be trusted; "" when it answers as before it slept."""
    try:
        await asyncio.wait_for(member.handle.wake.remote(), timeout_s)
        return difference(member.probed, await probed(member, timeout_s), dtype)
    except (RayError, TimeoutError) as error:
        return f"did not wake up ({_why(error)})"


def _why(error: BaseException) -> str:
    """An error of a call in one line, without Ray's wrapper."""
    return first_line(getattr(error, "cause", None) or error)


def dispatcher_of(pool: str) -> str:
    """The name of the Ray actor that is a pool's dispatcher."""
    return f"{pool}{_DISPATCHER}"


class Actors:
    """Starts and ends the Ray actors of the engines of a pool."""

    def __init__(self, pool: str, settings: config.Pool) -> None:
        self._pool = pool
        # The driver, on whose node the dispatcher runs, has checked a client's server. Another node may not reach the address.
        self._here = isinstance(settings, Client)

    def start(self, name: str, placement: config.Placement, inflight: int) -> Any:
        """Ask Ray for the actor of one engine. Ray starts it when there is room. Returns its handle."""
        options = resources.options(placement)
        if self._here:
            node = ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        return ray.remote(EngineActor).options(name=name, max_concurrency=inflight + 2, **options).remote()

    def nodes_may_come(self) -> bool:
        """Whether an autoscaler starts the cluster's nodes."""
        return cluster.has_autoscaler(ray.nodes())

    async def others_hold_more(self) -> bool:
        """Whether another pool of this driver has more engines in place than it keeps. Without work it ends them."""
        others = [name for name in list_named_actors() if name.endswith(_DISPATCHER) and name != dispatcher_of(self._pool)]
        for name in others:
            try:
                status: PoolStatus = await asyncio.wait_for(ray.get_actor(name).overview.remote(), _ANSWER_S)
            except (RayError, TimeoutError, ValueError):  # it ends just now, or gives no sign of life
                continue
            if sum(engine.pid > 0 for engine in status.engines) > max(1, status.least):
                return True
        return False

    def end(self, handle: Any) -> None:
        """End the process of an actor, whatever it does."""
        ray.kill(handle)
