"""The dispatcher: the small actor that owns a pool's engines, hands them out, replaces the dead and keeps their number right.

Callers get tickets here and talk to engines themselves: it sees names and counts, never data.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Coroutine
from operator import attrgetter
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors import sizing
from actors.member import EngineActor, EngineClass, Gone, Member, PoolStatus, Ticket, blameless
from actors.sizing import Bounds, Sizing
from pipeline import config
from pipeline.contract import EngineFacts
from pipeline.errors import EgrsdError, EngineError, UserError, first_line

log = logging.getLogger(__name__)

_WATCH_S = 3.0
_SIZE_S = 0.25
_FORGET_S = 15.0  # a ticket that its engine has not known for so long has no caller any more
_START_TRIES = 3  # engines that may fail to load, one after the other, before the pool gives up
_REMEMBERED = 8  # dead engines that `overview` tells of


class Dispatcher:
    """Owns the engine actors; knows who works for whom. Callers get tickets here and talk to engines themselves."""

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
        self._bounds = Bounds(settings.min, settings.max)
        self._sizing = Sizing(settings.min)
        self._pace = sizing.Pace(settings.grow_after_s, settings.shrink_after_s)
        self._queued = 0
        self._gone: deque[Gone] = deque(maxlen=_REMEMBERED)
        self._past = (0.0, 0.0)  # serving and working seconds of engines that are no more
        self._sizer: asyncio.Task[None] | None = None
        self._facts: EngineFacts | None = None
        self._failure: EgrsdError | None = None
        self._failures_to_load = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._line: deque[asyncio.Future[None]] = deque()  # callers that wait for room at any engine

    async def facts(self) -> EngineFacts:
        """Facts of the first engine that served. Raises what ended the pool."""
        self._queued += 1  # an empty pool starts an engine to know them
        try:
            self._wake()
            while self._facts is None or self._failure is not None:
                await self._change()
        finally:
            self._queued -= 1
        return self._facts

    async def acquire(self, rows: int, policy_version: int, alone: bool) -> Ticket:
        """The least loaded engine, once one has room; `alone`: once one is idle, and nobody else gets it meanwhile.

        Raises what ended the pool, also while engines are left.
        """
        ticket = uuid.uuid4().hex
        self._queued += 1
        try:
            self._wake()
            while self._failure is not None or (member := self._pick(ticket, alone)) is None:
                await self._change(in_line=not alone)
        finally:
            self._queued -= 1
        if not member.tickets:
            member.busy_since = time.monotonic()
        member.tickets[ticket] = rows
        member.policy_version = policy_version
        return Ticket(ticket, member.name, member.handle)

    async def release(self, ticket: str, rows: int, tokens: int) -> None:
        """A batch ended, with `rows` answered that hold `tokens`."""
        for member in self._members.values():
            if ticket in member.tickets:
                member.count(rows, tokens)
                self._drop(member, {ticket})
                return

    async def lost(self, engine: str, cause: str) -> None:
        """A caller saw this engine die, or its vLLM break: replace it."""
        if member := self._members.get(engine):
            self._bury(member, cause)

    async def resize(self, bounds: Bounds) -> None:
        """Hold to other bounds, from now on."""
        self._bounds = bounds
        self._wake()
        self._size()

    async def overview(self) -> PoolStatus:
        """The pool now."""
        self._wake()
        now = time.monotonic()
        live = self._members.values()
        return PoolStatus(
            engines=[member.status() for member in live],
            queued=self._queued,
            least=self._bounds.least,
            most=self._bounds.most,
            target=self._sizing.target,
            gone=[(gone.name, gone.cause, now - gone.at) for gone in self._gone],
            serving_s=self._past[0] + sum(m.serving_s(now) for m in live),
            working_s=self._past[1] + sum(m.working_s(now) for m in live),
        )

    async def close(self) -> None:
        """End all engines; later requests raise."""
        self._fail(EngineError("the pool was closed", self._setting))
        await asyncio.gather(*(self._end(member) for member in list(self._members.values())))

    # ---- members ---------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Begin to keep the pool's size; a dispatcher that Ray has restarted begins anew when it is first called."""
        if self._sizer is None:
            self._sizer = asyncio.get_running_loop().create_task(self._keep_size())

    async def _keep_size(self) -> None:
        while self._failure is None:
            try:
                self._size()
            except Exception as error:  # Ray refuses the placement: nobody else would hear of it
                log.exception("The pool cannot be sized")
                what = f"engines cannot be asked for ({type(error).__name__}: {first_line(error)})"
                self._fail(EngineError(what, f"{self._setting}.placement", "Change the placement"))
            await asyncio.sleep(_SIZE_S)

    def _size(self) -> None:
        """Start or drain engines, as the work there is asks for."""
        batches = self._queued + sum(len(m.tickets) for m in self._members.values())
        self._sizing = sizing.resize(self._sizing, batches, self._inflight, self._bounds, self._pace, time.monotonic())
        self._fill()
        staying = [m for m in self._members.values() if m.state != "draining"]
        staying.sort(key=lambda m: (m.state == "serving", m.load))
        for member in staying[: max(0, len(staying) - self._sizing.target)]:
            member.state = "draining"
            self._drop(member, set())

    def _fill(self) -> None:
        """Start the engines that are missing."""
        while self._failure is None and sum(m.state != "draining" for m in self._members.values()) < self._sizing.target:
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
        try:
            member.pid = await self._placed(member)
            facts = await asyncio.wait_for(member.handle.load.remote(*self._load_args), timeout)
        except RayTaskError as error:
            cause = error.cause
            told = cause if isinstance(cause, EgrsdError) else EngineError(first_line(cause), self._setting)
            self._failed_to_load(member, told, died=False)
        except RayError as error:  # of many kinds: Ray's memory monitor, say, has its own
            if blameless(error):
                return self._bury(member, first_line(error))
            self._failed_to_load(member, EngineError(f"its process died ({first_line(error)})", self._setting), died=True)
        except TimeoutError:
            remedy = "Raise start_timeout_s, or see what holds the resources"
            told = EngineError(f"an engine did not start within {timeout:g} s", self._setting, remedy)
            self._failed_to_load(member, told, died=False)
        else:
            self._failures_to_load = 0
            if not self._agrees(facts):
                return self._bury(member, "its numbers do not mean what the others' mean")
            member.serving_since = time.monotonic()
            if member.state == "loading":
                member.state = "serving"
            self._drop(member, set())
            self._notify()
            await self._watch(member)

    async def _placed(self, member: Member) -> int:
        """The process of an engine once Ray has found its place, for which it may wait as long as the autoscaler takes while
        others serve."""
        process: asyncio.Future[int] = asyncio.ensure_future(member.handle.pid.remote())
        served = self._others_serve()
        while not (await asyncio.wait({process}, timeout=self._settings.start_timeout_s))[0]:
            before, served = served, self._others_serve()
            if not (before or served):  # a pool that is about to replace its only engine has not failed
                process.cancel()
                raise TimeoutError
        return process.result()

    def _others_serve(self) -> bool:
        """Whether any engine answers now."""
        return any(member.state == "serving" for member in self._members.values())

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
        """Notice a death nobody reported, and tickets whose callers died: the engine has not known them for a while."""
        while member.name in self._members:
            await asyncio.sleep(_WATCH_S)
            try:
                absent = set(member.tickets) - set(await member.handle.active.remote())
            except RayError as error:
                self._bury(member, first_line(error))
            else:
                now = time.monotonic()
                member.unseen = {ticket: member.unseen.get(ticket, now) for ticket in absent}
                self._drop(member, {ticket for ticket, since in member.unseen.items() if now - since >= _FORGET_S})

    def _failed_to_load(self, member: Member, error: EgrsdError, died: bool) -> None:
        """Try another, unless it would only fail as well: a user's mistake, an error while no other serves, too many tries."""
        if member.name not in self._members:  # drained while it loaded
            return
        self._failures_to_load += 1
        if isinstance(error, UserError) or not (died or self._others_serve()):
            self._fail(error)
        elif self._failures_to_load >= _START_TRIES:
            what = f"{self._failures_to_load} engines could not be loaded, the last one because {error.what}"
            self._fail(EngineError(what, self._setting, error.remedy or "Out of memory? See the logs of the node"))
        self._bury(member, error.what)

    def _bury(self, member: Member, cause: str) -> None:
        if member.name not in self._members:
            return
        self._leave(member)
        self._gone.append(Gone(member.name, cause, time.monotonic()))
        ray.kill(member.handle)  # a broken engine's process may still be there
        if self._failure is None:
            log.warning("Engine %s is gone (%s): it is replaced", member.name, cause)
        self._fill()
        self._notify()

    def _leave(self, member: Member) -> None:
        del self._members[member.name]
        now = time.monotonic()
        serving, working = self._past
        self._past = (serving + member.serving_s(now), working + member.working_s(now))

    def _drop(self, member: Member, tickets: set[str]) -> None:
        held, room = bool(member.tickets), len(tickets)
        for ticket in tickets:
            member.tickets.pop(ticket, None)
            if member.held_for == ticket:
                member.held_for, room = None, len(self._line)
        if held and not member.tickets:
            member.busy_s += time.monotonic() - member.busy_since
        if member.state == "draining" and not member.tickets and member.name in self._members:
            self._leave(member)
            self._spawn(self._end(member))
        self._notify(room)

    async def _end(self, member: Member) -> None:
        try:
            if member.pid:  # else Ray still looks for a place for it
                await asyncio.wait_for(member.handle.close.remote(), 10)
        except (TimeoutError, RayError) as error:
            log.warning("Engine %s did not close: %s", member.name, first_line(error))
        ray.kill(member.handle)

    # ---- waiting ---------------------------------------------------------------------------------------------------

    def _pick(self, ticket: str, alone: bool) -> Member | None:
        serving = [m for m in self._members.values() if m.state == "serving" and m.held_for in (None, ticket)]
        if alone:
            held = next((m for m in serving if m.held_for == ticket), min(serving, key=attrgetter("load"), default=None))
            if held is not None:
                held.held_for = ticket
            return held if held is not None and not held.tickets else None
        return min((m for m in serving if len(m.tickets) < self._inflight), key=attrgetter("load"), default=None)

    async def _change(self, in_line: bool = False) -> None:
        if self._failure is not None:
            raise self._failure
        if in_line:
            self._line.append(turn := asyncio.get_running_loop().create_future())
            await turn
        else:
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure

    def _notify(self, room: int | None = None) -> None:
        """Wake who waits. Of those in line only as many as there is new `room` for, where that is known: at a thousand engines
        a thousand callers that each look at every engine, at each batch that ends, let through ten batches a second."""
        self._changed.set()
        self._changed = asyncio.Event()
        for _ in range(len(self._line) if room is None else min(room, len(self._line))):
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)

    def _fail(self, error: EgrsdError) -> None:
        self._failure = self._failure or error
        self._notify()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:  # ours: nobody waits for an engine in vain
            log.error("The dispatcher failed", exc_info=error)
            self._fail(EngineError(f"the pool failed ({type(error).__name__}: {first_line(error)})", self._setting))
