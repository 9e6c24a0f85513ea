"""The pool of engine actors: start, route, replace, resize.

    caller --- acquire / release (names and counts only) ---> Dispatcher (one small actor) --- starts, watches ---> engines
    caller --- requests, answers --------------------------------------------------------------------------------> engine

The dispatcher hands out the least loaded engine and never sees the data. Engines are plain Ray actors that live as long as the
run: Ray Data's actor pools live for one execution and would load the model again every round. The driver owns the dispatcher
and the dispatcher its engines, so when either dies Ray ends what it owned, and nothing is orphaned.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import resources
from actors.cluster import check_room
from actors.dispatcher import Dispatcher
from actors.engine import Engine
from actors.member import EngineClass, EngineStatus, PoolStatus, blameless
from actors.sizing import Bounds
from pipeline import config
from pipeline.contract import EngineFacts, Failure, Generate, Generation, Policy, Sampling, Score, Sequence, Usage
from pipeline.errors import EgrsdError, EngineError, first_line

log = logging.getLogger(__name__)

_DEATHS = (RayActorError, ObjectLostError, OutOfMemoryError, NodeDiedError, WorkerCrashedError, EngineError)
_PIECES = 8  # into how many a suspect batch is split: every death costs an engine's load, a small batch little


class EnginePool:
    """Engines as stages see them, answered by a pool. Picklable: usable from the driver and from any Ray task or actor."""

    def __init__(self, dispatcher: Any, settings: config.Pool, setting: str) -> None:
        self._dispatcher, self._settings, self._setting = dispatcher, settings, setting
        self._asked: Bounds | None = None  # what `resize` asked for last

    @classmethod
    def start(
        cls,
        name: str,
        model: config.Model,
        settings: config.Pool,
        score: config.ScoreSettings,
        engine_class: EngineClass = Engine,
        inflight: int = 4,
    ) -> EnginePool:
        """Start `settings.min` engines and return at once; `facts()` waits for the first one.

        `inflight` batches may be at one engine at a time; what waits beyond that makes the pool grow, up to `settings.max`.
        Raises ResourceError when the cluster can never hold the engines.
        """
        setting = f"engines.{name}"
        check_room([resources.Demand(setting, max(settings.min, 1), settings.placement)])
        here = ray.get_runtime_context().get_node_id()  # the driver's: a spot machine would take all other engines along
        dispatcher: Any = (
            ray.remote(Dispatcher)
            .options(
                name=f"{name}-pool",
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
                max_concurrency=10_000,
                max_restarts=-1,  # a killed dispatcher takes its engines along, and starts anew with fresh ones
                max_task_retries=-1,
            )
            .remote(name, model, settings, score, engine_class, inflight)
        )
        dispatcher.overview.remote()  # sets it going
        return cls(dispatcher, settings, setting)

    def facts(self) -> EngineFacts:
        """What the engines' numbers mean; waits for the first engine. Raises what kept it from starting."""
        return self._tell(self._dispatcher.facts.remote())

    def generate(self, requests: list[Generate], policy: Policy, sampling: Sampling) -> list[Generation | Failure]:
        """One trace per request, in order. A request that keeps killing its engine is a Failure; its neighbours are answered.

        Raises ModelError (adapter) as the engine does, and EngineError or ModelError when the pool cannot start engines.
        """
        return self._ask("generate", requests, policy, sampling)

    def score(self, sequences: list[Sequence], policy: Policy) -> list[Score | Failure]:
        """Log-probs and entropies of every response, in order; fails as `generate` does."""
        return self._ask("score", sequences, policy)

    def resize(self, least: int, most: int | None = None) -> None:
        """Keep at least `least` and at most `most` engines (default: exactly `least`) from now on. New ones join once loaded,
        surplus ones finish what they hold.

        Raises ResourceError when the cluster can never hold them.
        """
        most = max(1, least) if most is None else most
        check_room([self.demand(most)])
        self._asked = Bounds(least, most)
        self._tell(self._dispatcher.resize.remote(self._asked))

    def demand(self, count: int) -> resources.Demand:
        """What `count` of its engines ask of the cluster."""
        return resources.Demand(self._setting, count, self._settings.placement)

    def status(self) -> list[EngineStatus]:
        """The engines now, in the order they were started."""
        return self.overview().engines

    def overview(self) -> PoolStatus:
        """The engines, those that died, what waits for one, and the bounds."""
        found: PoolStatus = self._tell(self._dispatcher.overview.remote())
        if self._asked not in (None, Bounds(found.least, found.most)):  # a dispatcher that was restarted has forgotten
            self._tell(self._dispatcher.resize.remote(self._asked))
            found = self._tell(self._dispatcher.overview.remote())
        return found

    def usage(self) -> Usage:
        """What its engines have done so far."""
        now = self.overview()
        return Usage(max((engine.busy_s for engine in now.engines), default=0.0), now.serving_s - now.working_s, now.most)

    def close(self) -> None:
        """End the engines and the dispatcher."""
        try:
            ray.get(self._dispatcher.close.remote(), timeout=30)
        except (RayActorError, GetTimeoutError):
            log.warning("The pool of %s did not close in time: it is ended", self._setting)
        ray.kill(self._dispatcher)

    def _tell(self, ref: Any) -> Any:
        """An answer of the dispatcher."""
        try:
            return _get(ref)
        except RayActorError as error:
            raise EngineError(f"the pool is gone ({first_line(error)})", self._setting, "Start the run again") from None

    def _ask(self, method: str, items: list[Any], policy: Policy, *more: Any) -> list[Any]:
        answers: list[Any] = [None] * len(items)
        pieces = deque([_Piece(list(range(len(items))))] if items else [])
        while pieces:
            piece = pieces.popleft()
            ticket = self._tell(self._dispatcher.acquire.remote(len(piece.rows), policy.version, piece.alone))
            try:
                call = getattr(ticket.handle, method).remote(ticket.id, [items[row] for row in piece.rows], policy, *more)
                found = _get(call)
            except _DEATHS as error:
                self._tell(self._dispatcher.lost.remote(ticket.engine, first_line(error)))
                pieces.extend(self._after_death(piece, error, answers))
                continue
            except BaseException:
                self._dispatcher.release.remote(ticket.id, 0, 0)
                raise
            self._dispatcher.release.remote(ticket.id, len(found), _num_tokens(found))
            for row, answer in zip(piece.rows, found, strict=True):
                answers[row] = answer
        return answers

    def _after_death(self, piece: _Piece, error: Exception, answers: list[Any]) -> list[_Piece]:
        """What to ask again. The first death may be the machine's fault; after the second the batch is asked alone, in parts,
        so that in the end one row alone has killed an engine that served no one else: twice, since one death that it did not
        cause must not be held against it with those that a neighbour caused before."""
        if blameless(error):
            return [piece]
        deaths, tries = piece.deaths + 1, self._settings.request_tries
        single = len(piece.rows) == 1
        lone = piece.lone + (piece.alone and single)
        if deaths >= tries and lone >= min(2, tries):
            answers[piece.rows[0]] = Failure(f"killed its engine {deaths} times: {first_line(error)}")
            return []
        if deaths < min(2, tries):
            return [_Piece(piece.rows, deaths)]
        size = -(-len(piece.rows) // _PIECES)
        return [_Piece(piece.rows[i : i + size], deaths, lone, alone=True) for i in range(0, len(piece.rows), size)]


@dataclass(frozen=True)
class _Piece:
    """Rows of a caller's batch that go to one engine together; `alone`: with no other caller's. `deaths` of engines that held
    them, `lone` those that held nothing but this one row."""

    rows: list[int]
    deaths: int = 0
    lone: int = 0
    alone: bool = False


def _num_tokens(answers: list[Generation | Score | Failure]) -> int:
    """Response tokens that a batch wrote or scored."""
    return sum(len(answer.tokens) for answer in answers if not isinstance(answer, Failure))


def rescale(
    pools: Mapping[str, EnginePool], sizes: Mapping[str, tuple[int, int]], beside: Iterable[resources.Demand]
) -> dict[str, PoolStatus]:
    """Hold pools to other sizes, the least and the most engines of each; returns how all of them are then.

    `beside`: what else the run asks of the cluster. Raises ResourceError when the cluster can never hold all of it at once.
    """
    if sizes:
        most_of = {name: sizes[name][1] if name in sizes else max(1, pool.overview().least) for name, pool in pools.items()}
        check_room([*(pools[name].demand(most) for name, most in most_of.items()), *beside])
    for name, (least, most) in sizes.items():
        pools[name].resize(least, most)
    return {name: pool.overview() for name, pool in pools.items()}


def _get(ref: Any) -> Any:
    """ray.get, with this project's errors as they were raised."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, EgrsdError):
            raise error.cause from None
        raise
