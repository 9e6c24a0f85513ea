"""The pool of engine actors: start, route, replace, resize.

    caller ---- acquire, release ---> Dispatcher ---- starts, watches ---> engines
    caller ---- requests, answers ---------------------------------------> engine

The dispatcher never sees the data. It hands out the engine with the fewest rows. Engines are plain Ray actors that live as long
as the run. The actor pools of Ray Data would not do: they live for one execution, and would load the model again every round.

The driver owns the dispatcher, and the dispatcher owns the engines. When an owner dies, Ray ends what it owned, so that no
process is left behind.
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
from actors.inference.engine import Engine
from actors.pool.asking import dispatcher_of
from actors.pool.dispatcher import Dispatcher
from actors.pool.member import EngineClass, PoolStatus, blameless
from actors.pool.pool_watch import Watch
from actors.pool.sizing import Bounds
from pipeline import config
from pipeline.config.machines import Client
from pipeline.contract import EngineFacts, Failure, Generate, Generation, Policy, Sampling, Score, Sequence, Usage
from pipeline.errors import EgrsdError, EngineError, SettingError, first_line
from pipeline.live import card

log = logging.getLogger(__name__)

_DEATHS: tuple[type[Exception], ...] = (RayActorError, ObjectLostError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
_PIECES = 8  # parts of a suspect batch. A death costs the load of an engine; a small batch costs little


class EnginePool:
    """A pool of engines behind the methods of one engine. It can be pickled, and used by the driver, Ray tasks and actors."""

    def __init__(self, dispatcher: Any, settings: config.Pool, setting: str) -> None:
        self._dispatcher, self._settings, self._setting = dispatcher, settings, setting
        # An engine that raises EngineError is broken. A client that does so is well: it has asked its server as often as it may.
        self._deaths: tuple[type[Exception], ...] = _DEATHS if isinstance(settings, Client) else (*_DEATHS, EngineError)
        self._wanted: Bounds | None = None  # the bounds of the last `resize`
        self._watch: Watch | None = None
        self._facts: EngineFacts | None = None  # those of the last ticket: asking for them at every batch is a call too many

    def __reduce__(self) -> tuple[type[EnginePool], tuple[Any, config.Pool, str]]:
        return EnginePool, (self._dispatcher, self._settings, self._setting)  # the driver alone watches the dispatcher

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

        An engine takes up to `inflight` batches at a time. Batches that wait beyond that make the pool grow, up to
        `settings.max` engines. Raises ResourceError when the cluster can never hold the engines.
        """
        setting = resources.setting_of(name)
        check_room([resources.Demand(setting, max(settings.min, 1), resources.placement_of(settings))])
        load_args = (engine_class, model, settings, score, card.name_here() if settings.colocate else "")
        # The dispatcher runs on the driver's node. If it ran on a spot machine, its loss would end all engines.
        here = ray.get_runtime_context().get_node_id()
        dispatcher: Any = (
            ray.remote(Dispatcher)
            .options(
                name=dispatcher_of(name),
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
                max_concurrency=10_000,
                max_restarts=-1,  # Ray ends the engines of a killed dispatcher and restarts it; it then starts new engines
                max_task_retries=-1,
            )
            .remote(name, settings, inflight, load_args)
        )
        dispatcher.overview.remote()  # the first call makes the dispatcher start engines
        pool = cls(dispatcher, settings, setting)
        pool._watch = Watch(dispatcher, settings, setting)
        pool.wake()
        return pool

    def facts(self) -> EngineFacts:
        """What the engines' numbers mean, once the first engine serves. Raises the error that kept it from starting."""
        return self._facts or self._await(self._dispatcher.facts.remote())

    def generate(self, requests: list[Generate], policy: Policy, sampling: Sampling) -> list[Generation | Failure]:
        """One trace per request, in order. A request that keeps killing its engine becomes a Failure; the others are answered.

        Raises ModelError for an adapter that does not fit, and EngineError or ModelError when the pool cannot start engines.
        Raises EngineError for a teacher's server that stays down or slow.
        """
        return self._ask("generate", requests, policy, sampling)

    def score(self, sequences: list[Sequence], policy: Policy) -> list[Score | Failure]:
        """Log-probs and entropies of every response, in order. Raises as `generate` does."""
        return self._ask("score", sequences, policy)

    def resize(self, least: int, most: int | None = None) -> None:
        """Keep at least `least` and at most `most` engines from now on; without `most` exactly `least`.

        New engines join once they have loaded, and surplus engines finish their batches. Raises ResourceError when the cluster
        can never hold `most` engines.
        """
        most = max(1, least) if most is None else most
        if self._settings.colocate and most > 1:
            raise SettingError(f"one engine shares the card with the trainer, and {most} are asked for", self._setting)
        check_room([self.demand(most)])
        self._wanted = Bounds(least, most)
        self._await(self._dispatcher.resize.remote(self._wanted))

    def demand(self, count: int) -> resources.Demand:
        """What `count` engines of this pool ask of the cluster."""
        return resources.Demand(self._setting, count, resources.placement_of(self._settings))

    def overview(self) -> PoolStatus:
        """The living and the dead engines, the batches that wait, and the bounds."""
        status: PoolStatus = self._await(self._dispatcher.overview.remote())
        if self._wanted not in (None, Bounds(status.least, status.most)):  # a restarted dispatcher has forgotten them
            self._await(self._dispatcher.resize.remote(self._wanted))
            status = self._await(self._dispatcher.overview.remote())
        return status

    def usage(self) -> Usage:
        """What the engines of this pool have done so far."""
        now = self.overview()
        busy = {engine.name: engine.busy_s for engine in now.engines}
        return Usage({self._setting: busy}, now.serving_s - now.working_s, now.most)

    def sleep(self) -> None:
        """Free the card that the engine shares with the trainer. Returns once the engine sleeps, or is told to end.

        Without `colocate` nothing happens. Raises the error that ended the pool.
        """
        if self._watch is not None and self._settings.colocate:
            with self._watch.turn:
                self._watch.awake = False
                self._await(self._dispatcher.sleep.remote())

    def wake(self) -> None:
        """Let the engine use the shared card again. Returns at once; batches wait until it answers."""
        if self._watch is not None and self._settings.colocate:
            with self._watch.turn:
                self._watch.awake = True
                self._await(self._dispatcher.wake.remote())

    def close(self) -> None:
        """End the engines and the dispatcher."""
        if self._watch is not None:
            self._watch.end()
        try:
            ray.get(self._dispatcher.close.remote(), timeout=30)
        except (RayActorError, GetTimeoutError):
            log.warning("The pool of %s did not close in time: it is ended", self._setting)
        ray.kill(self._dispatcher)

    def _await(self, ref: Any) -> Any:
        """The dispatcher's answer. Raises its error, or EngineError when the dispatcher has died."""
        try:
            return _get(ref)
        except RayActorError as error:
            raise EngineError(f"the pool is gone ({first_line(error)})", self._setting, "Start the run again") from None

    def _ask(self, method: str, items: list[Any], policy: Policy, *more: Any) -> list[Any]:
        """Answers of the engines' `method` to `items`, in order. Batches of engines that die are asked again."""
        answers: list[Any] = [None] * len(items)
        pieces = deque([Piece(list(range(len(items))))] if items else [])
        while pieces:
            piece = pieces.popleft()
            ticket = self._await(self._dispatcher.acquire.remote(len(piece.rows), policy.version, piece.alone))
            self._facts = ticket.facts  # a dispatcher that Ray has restarted may have engines with others
            try:
                call = getattr(ticket.handle, method).remote(ticket.id, [items[row] for row in piece.rows], policy, *more)
                answered = _get(call)
            except self._deaths as error:
                self._await(self._dispatcher.lost.remote(ticket.engine, first_line(error)))
                pieces.extend(after_death(piece, error, self._settings.request_tries, answers))
                continue
            except BaseException:
                self._dispatcher.release.remote(ticket.id, 0, 0)
                raise
            self._dispatcher.release.remote(ticket.id, len(answered), _num_tokens(answered))
            for row, answer in zip(piece.rows, answered, strict=True):
                answers[row] = answer
        return answers


@dataclass(frozen=True)
class Piece:
    """Rows of a caller's batch that go to one engine together."""

    rows: list[int]  # places in the batch
    deaths: int = 0  # engines that died with these rows
    single_deaths: int = 0  # of these deaths, those in which the engine held a single row and nothing else
    alone: bool = False  # whether the engine may hold no other caller's rows


def after_death(piece: Piece, error: Exception, tries: int, answers: list[Any]) -> list[Piece]:
    """The pieces to ask again after an engine died with `piece`. A row that is given up becomes a Failure in `answers`.

    The first death may be the machine's fault, so the same rows are asked again. After the second death the rows are split
    into parts, and each part gets an engine without other callers. In the end a single row has killed such an engine.
    The row is given up after `tries` deaths, two of them its own, because neighbours may have caused the others.
    """
    if blameless(error):
        return [piece]
    deaths, single = piece.deaths + 1, len(piece.rows) == 1
    single_deaths = piece.single_deaths + (piece.alone and single)
    if deaths >= tries and single_deaths >= min(2, tries):
        answers[piece.rows[0]] = Failure(f"killed its engine {deaths} times: {first_line(error)}")
        return []
    if deaths < min(2, tries):
        return [Piece(piece.rows, deaths)]
    size = -(-len(piece.rows) // _PIECES)
    parts = (piece.rows[start : start + size] for start in range(0, len(piece.rows), size))
    return [Piece(rows, deaths, single_deaths, alone=True) for rows in parts]


def _num_tokens(answers: list[Generation | Score | Failure]) -> int:
    """Response tokens that the engines wrote or scored for a batch."""
    return sum(len(answer.tokens) for answer in answers if not isinstance(answer, Failure))


def rescale(
    pools: Mapping[str, EnginePool], sizes: Mapping[str, tuple[int, int]], beside: Iterable[resources.Demand]
) -> dict[str, PoolStatus]:
    """Give pools other sizes, (least, most) engines each, and return the status of every pool after that.

    `beside` is what else the run asks of the cluster. Raises ResourceError when the cluster can never hold all of it at once,
    and SettingError for a pool that is not up.
    """
    if absent := sorted(sizes.keys() - pools.keys()):
        raise SettingError("is not up: nothing that this command has left to do asks it", absent[0], f"Pools: {', '.join(pools)}")
    if sizes:
        most_of = {name: sizes[name][1] if name in sizes else max(1, pool.overview().least) for name, pool in pools.items()}
        check_room([*(pools[name].demand(most) for name, most in most_of.items()), *beside])
    for name, (least, most) in sizes.items():
        pools[name].resize(least, most)
    return {name: pool.overview() for name, pool in pools.items()}


def _get(ref: Any) -> Any:
    """ray.get that raises this project's errors as the engine raised them, without Ray's wrapper."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, EgrsdError):
            raise error.cause from None
        raise
