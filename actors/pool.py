"""The pool of engine actors: start, route, replace, resize.

    caller --- acquire / release (names and counts only) ---> Dispatcher (one small actor) --- starts, watches ---> engines
    caller --- requests, answers --------------------------------------------------------------------------------> engine

The dispatcher hands out the least loaded engine and never sees the data. Engines are plain Ray actors that live as long as the
run: Ray Data's actor pools live for one execution and would load the model again every round. The driver owns the dispatcher
and the dispatcher its engines, so when either dies Ray ends what it owned, and nothing is orphaned.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from actors import resources
from actors.engine import Engine
from actors.serving import EngineActor, EngineClass, EngineStatus, Lease, Member
from pipeline import config
from pipeline.contract import EngineFacts, Failure, Generate, Generation, Policy, Sampling, Score, Sequence
from pipeline.errors import EgrsdError, EngineError, first_line

log = logging.getLogger(__name__)

_WATCH_S = 3.0
_START_TRIES = 3  # processes that may die while loading, one after the other, before the pool gives up
_PIECES = 8  # into how many a suspect batch is split: every death costs an engine's load, a small batch little


class EnginePool:
    """Engines as stages see them, answered by a pool. Picklable: usable from the driver and from any Ray task or actor."""

    def __init__(self, dispatcher: Any, settings: config.Pool, setting: str) -> None:
        self._dispatcher, self._settings, self._setting = dispatcher, settings, setting

    @classmethod
    def start(
        cls,
        name: str,
        model: config.Model,
        settings: config.Pool,
        score: config.ScoreSettings,
        engine_class: EngineClass = Engine,
        inflight: int = 4,
        namespace: str | None = None,
    ) -> EnginePool:
        """Start `settings.min` engines and return at once; `facts()` waits for the first one.

        `inflight` batches may be at one engine at a time. `namespace` makes the pool findable from other jobs as "<name>-pool".
        Raises ResourceError when the cluster can never hold the engines.
        """
        setting = f"engines.{name}"
        resources.check([resources.Demand(setting, max(settings.min, 1), settings.placement)], cluster_nodes())
        dispatcher: Any = (
            ray.remote(Dispatcher)
            .options(
                name=f"{name}-pool",
                namespace=namespace,
                num_cpus=0,
                max_concurrency=10_000,
                max_restarts=-1,  # a killed dispatcher takes its engines along, and starts anew with fresh ones
                max_task_retries=-1,
            )
            .remote(name, model, settings, score, engine_class, inflight)
        )
        dispatcher.resize.remote(settings.min)
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

    def resize(self, count: int) -> None:
        """Change the number of engines: new ones join once loaded, surplus ones finish what they hold.

        Raises ResourceError when the cluster can never hold them.
        """
        resources.check([resources.Demand(self._setting, count, self._settings.placement)], cluster_nodes())
        self._tell(self._dispatcher.resize.remote(count))

    def status(self) -> list[EngineStatus]:
        """The engines now, in the order they were started."""
        return self._tell(self._dispatcher.status.remote())

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
            lease = self._tell(self._dispatcher.acquire.remote(len(piece.rows), policy.version, piece.alone))
            try:
                call = getattr(lease.handle, method).remote(lease.id, [items[row] for row in piece.rows], policy, *more)
                found = _get(call)
            except (RayActorError, ObjectLostError, EngineError) as error:
                self._tell(self._dispatcher.lost.remote(lease.engine, first_line(error)))
                pieces.extend(self._after_death(piece, error, answers))
                continue
            except BaseException:
                self._dispatcher.release.remote(lease.id, 0)
                raise
            self._dispatcher.release.remote(lease.id, len(found))
            for row, answer in zip(piece.rows, found, strict=True):
                answers[row] = answer
        return answers

    def _after_death(self, piece: _Piece, error: Exception, answers: list[Any]) -> list[_Piece]:
        """What to ask again. The first death may be the machine's fault; after the second the batch is asked alone, in parts,
        so that in the end one row alone has killed an engine that served no one else."""
        deaths, tries = piece.deaths + 1, self._settings.request_tries
        if piece.alone and len(piece.rows) == 1 and deaths >= tries:
            answers[piece.rows[0]] = Failure(f"killed its engine {deaths} times: {first_line(error)}")
            return []
        if deaths < min(2, tries):
            return [_Piece(piece.rows, deaths)]
        size = -(-len(piece.rows) // _PIECES)
        return [_Piece(piece.rows[i : i + size], deaths, alone=True) for i in range(0, len(piece.rows), size)]


@dataclass(frozen=True)
class _Piece:
    """Rows of a caller's batch that go to one engine together; `alone`: with no other caller's."""

    rows: list[int]
    deaths: int = 0
    alone: bool = False


def cluster_nodes() -> list[resources.Node]:
    """The cluster's live nodes; with an autoscaler, as many nodes of every type as it may start."""
    from ray._private.state import state

    grown = state.get_cluster_config()
    nodes = [resources.Node(n["Resources"], n.get("Labels", {})) for n in ray.nodes() if n["Alive"]]
    if grown is not None and grown.node_group_configs:
        for group in grown.node_group_configs:
            most = 10_000 if group.max_count < 0 else group.max_count
            nodes += [resources.Node(dict(group.resources))] * most
    return nodes


def _get(ref: Any) -> Any:
    """ray.get, with this project's errors as they were raised."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, EgrsdError):
            raise error.cause from None
        raise


class Dispatcher:
    """Owns the engine actors; knows who works for whom. Callers get leases here and talk to engines themselves."""

    def __init__(
        self,
        name: str,
        model: config.Model,
        settings: config.Pool,
        score: config.ScoreSettings,
        engine_class: EngineClass,
        inflight: int,
    ) -> None:
        self._name, self._settings, self._inflight = name, settings, inflight
        self._setting = f"engines.{name}"
        self._load_args = (engine_class, model, settings, score)
        self._members: dict[str, Member] = {}
        self._target = settings.min
        self._facts: EngineFacts | None = None
        self._failure: EgrsdError | None = None
        self._deaths_loading = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def facts(self) -> EngineFacts:
        """Facts of the first engine that served. Raises what ended the pool."""
        self._fill(at_least=1)
        while self._facts is None or self._failure is not None:
            await self._change()
        return self._facts

    async def acquire(self, rows: int, policy_version: int, alone: bool) -> Lease:
        """The least loaded engine, once one has room; `alone`: once one is idle, and nobody else gets it meanwhile.

        Raises what ended the pool, also while engines are left.
        """
        ticket = uuid.uuid4().hex
        self._fill(at_least=1)
        while self._failure is not None or (member := self._pick(ticket, alone)) is None:
            await self._change()
        if not member.leases:
            member.busy_since = time.monotonic()
        member.leases[ticket] = rows
        member.policy_version = policy_version
        return Lease(ticket, member.name, member.handle)

    async def release(self, lease: str, answered: int) -> None:
        """A batch ended, with `answered` rows."""
        for member in self._members.values():
            if lease in member.leases:
                member.rows += answered
                self._drop(member, {lease})
                return

    async def lost(self, engine: str, cause: str) -> None:
        """A caller saw this engine die, or its vLLM break: replace it."""
        if member := self._members.get(engine):
            self._bury(member, cause)

    async def resize(self, count: int) -> None:
        """Start engines up to `count`, or let the least loaded ones finish and end."""
        self._target = count
        self._fill()
        staying = [m for m in self._members.values() if m.state != "draining"]
        staying.sort(key=lambda m: (m.state == "serving", m.load))
        for member in staying[: max(0, len(staying) - count)]:
            member.state = "draining"
            self._drop(member, set())

    async def status(self) -> list[EngineStatus]:
        """One line per engine."""
        return [member.status() for member in self._members.values()]

    async def close(self) -> None:
        """End all engines; later requests raise."""
        self._fail(EngineError("the pool was closed", self._setting))
        await asyncio.gather(*(self._end(member) for member in list(self._members.values())))

    # ---- members ---------------------------------------------------------------------------------------------------

    def _fill(self, at_least: int = 0) -> None:
        """Start what is missing; `at_least`: a pool that was to be empty wakes up when it is asked for something."""
        self._target = max(self._target, at_least)
        while self._failure is None and sum(m.state != "draining" for m in self._members.values()) < self._target:
            name = f"{self._name}-{uuid.uuid4().hex[:8]}"
            member = Member(name, self._actor(name))
            self._members[name] = member
            self._spawn(self._serve(member))

    def _actor(self, name: str) -> Any:
        placement = self._settings.placement
        options: dict[str, Any] = {"num_cpus": placement.cpus, "num_gpus": placement.gpus, "resources": placement.resources}
        if placement.labels:
            options["label_selector"] = placement.labels
        return ray.remote(EngineActor).options(name=name, max_concurrency=self._inflight + 2, **options).remote()

    async def _serve(self, member: Member) -> None:
        """Bring an engine up, then look after it until it ends."""
        timeout = self._settings.start_timeout_s
        others = any(m.state == "serving" for m in self._members.values())
        try:
            # While others serve, a new engine may wait for its machine as long as the autoscaler takes.
            member.pid = await asyncio.wait_for(member.handle.pid.remote(), None if others else timeout)
            facts = await asyncio.wait_for(member.handle.load.remote(*self._load_args), timeout)
        except RayActorError as error:
            self._died_loading(member, error)
        except TimeoutError:
            remedy = "Raise start_timeout_s, or see what holds the resources"
            self._fail(EngineError(f"an engine did not start within {timeout:g} s", self._setting, remedy))
        except RayTaskError as error:
            cause = error.cause
            self._fail(cause if isinstance(cause, EgrsdError) else EngineError(first_line(cause), self._setting))
        else:
            self._deaths_loading = 0
            if not self._agrees(facts):
                return self._bury(member, "its numbers do not mean what the others' mean")
            if member.state == "loading":
                member.state = "serving"
            self._drop(member, set())
            await self._watch(member)

    def _agrees(self, facts: EngineFacts) -> bool:
        """Whether a new engine's numbers mean what those of the first mean. If not, the pool ends: no one may mix them."""
        self._facts = first = self._facts or facts
        odd = [
            f"{name} is {got!r}, the first engine's {was!r}"
            for name, was in vars(first).items()
            if (got := vars(facts)[name]) != was
        ]
        if odd:
            what = f"engines differ in what their numbers mean: an engine's {'; '.join(odd)}"
            self._fail(
                EngineError(what, self._setting, "Give all engines the same vLLM and hardware, or set score.entropy: bounds")
            )
        return not odd

    async def _watch(self, member: Member) -> None:
        """Notice a death nobody reported, and leases whose callers died: the engine does not know them, twice in a row."""
        while member.name in self._members:
            await asyncio.sleep(_WATCH_S)
            try:
                unseen = set(member.leases) - set(await member.handle.active.remote())
            except RayActorError as error:
                self._bury(member, first_line(error))
            else:
                self._drop(member, unseen & member.unseen)
                member.unseen = unseen

    def _died_loading(self, member: Member, error: RayActorError) -> None:
        self._deaths_loading += 1
        if self._deaths_loading >= _START_TRIES:
            what = f"{self._deaths_loading} engine processes died while loading ({first_line(error)})"
            self._fail(EngineError(what, self._setting, "Out of memory? See the logs of the node"))
        self._bury(member, first_line(error))

    def _bury(self, member: Member, cause: str) -> None:
        if self._members.pop(member.name, None) is None:
            return
        ray.kill(member.handle)  # a broken engine's process may still be there
        if self._failure is None:
            log.warning("Engine %s is gone (%s): it is replaced", member.name, cause)
        self._fill()
        self._notify()

    def _drop(self, member: Member, leases: set[str]) -> None:
        held = bool(member.leases)
        for lease in leases:
            member.leases.pop(lease, None)
            if member.held_for == lease:
                member.held_for = None
        if held and not member.leases:
            member.busy_s += time.monotonic() - member.busy_since
        if member.state == "draining" and not member.leases and member.name in self._members:
            del self._members[member.name]
            self._spawn(self._end(member))
        self._notify()

    async def _end(self, member: Member) -> None:
        try:
            await asyncio.wait_for(member.handle.close.remote(), 10)
        except (TimeoutError, RayActorError, RayTaskError) as error:
            log.warning("Engine %s did not close: %s", member.name, first_line(error))
        ray.kill(member.handle)

    # ---- waiting ---------------------------------------------------------------------------------------------------

    def _pick(self, ticket: str, alone: bool) -> Member | None:
        serving = [m for m in self._members.values() if m.state == "serving" and m.held_for in (None, ticket)]
        if alone:
            held = next((m for m in serving if m.held_for == ticket), min(serving, key=attrgetter("load"), default=None))
            if held is not None:
                held.held_for = ticket
            return held if held is not None and not held.leases else None
        return min((m for m in serving if len(m.leases) < self._inflight), key=attrgetter("load"), default=None)

    async def _change(self) -> None:
        if self._failure is not None:
            raise self._failure
        await self._changed.wait()
        if self._failure is not None:
            raise self._failure

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _fail(self, error: EgrsdError) -> None:
        self._failure = self._failure or error
        self._notify()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
