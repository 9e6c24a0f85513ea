"""The dispatcher: the small actor that owns a pool's engines, hands them out, replaces dead ones and keeps their number right.

A caller gets a ticket for an engine from the dispatcher, and then sends its batch to that engine itself. The dispatcher sees
names and counts, and never data.
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

from ray.exceptions import RayError, RayTaskError

from actors import resources
from actors.pool import asking, sizing
from actors.pool.asking import Actors
from actors.pool.callers import Callers
from actors.pool.member import STALLED, Gone, LoadArgs, Member, PoolStatus, Ticket, blameless
from actors.pool.probe import Probed, difference, disagreement
from actors.pool.ready import Ready
from actors.pool.sizing import Bounds, Sizing
from actors.pool.starts import Starts
from pipeline import config
from pipeline.contract import EngineFacts
from pipeline.errors import EgrsdError, EngineError, UserError, first_line, whole_cause
from pipeline.fit import code

log = logging.getLogger(__name__)

_WATCH_S, _SIZE_S = 3.0, 0.25
_FORGET_S = 15.0  # a ticket that its engine has not known for this long has lost its caller
_START_TRIES = 3  # a pool that lacks engines gives up when this many tries in a row fail
_REMEMBERED = 8  # `overview` lists this many dead engines


class Dispatcher:
    """Owns the engine actors of one pool, and knows which ticket is at which engine."""

    def __init__(
        self, name: str, settings: config.Pool, inflight: int, load_args: LoadArgs, actors: Actors | None = None
    ) -> None:
        """`load_args` are those of every engine. `actors` starts and ends the actors of engines; None stands for those of Ray."""
        self._name, self._settings, self._inflight, self._load_args = name, settings, inflight, load_args
        self._actors = actors or Actors(name, settings)
        self._setting = resources.setting_of(name)
        self._members: dict[str, Member] = {}
        self._at: dict[str, Member] = {}  # ticket id -> the engine that has its batch
        self._ready = Ready(inflight)
        self._bounds = Bounds(settings.min, settings.max)
        self._sizing = Sizing(settings.min)
        self._pace = sizing.Pace(settings.grow_after_s, settings.shrink_after_s)
        self._queued, self._starts = 0, Starts()
        self._gone: deque[Gone] = deque(maxlen=_REMEMBERED)
        self._past = (0.0, 0.0)  # serving and working seconds of engines that have ended
        self._sizer: asyncio.Task[None] | None = None
        self._facts: EngineFacts | None = None
        self._awake = not settings.colocate  # a dispatcher that Ray restarts does not know whose turn it is: it is told
        self._probed: Probed = {}  # what the first engine on a shared card answered to the probe
        self._tasks: set[asyncio.Task[None]] = set()
        self._callers = Callers(code.other_code())

    async def facts(self) -> EngineFacts:
        """Facts of the first engine that served. Raises the error that ended the pool."""
        self._queued += 1  # counts as a waiting batch, so that an empty pool starts an engine
        try:
            self._begin()
            while self._facts is None or self._callers.failure is not None:
                await self._callers.change()
        finally:
            self._queued -= 1
        return self._facts

    async def acquire(self, rows: int, policy_version: int, alone: bool) -> Ticket:
        """A ticket for the engine with the fewest rows, as soon as one has room for a batch of `rows`.

        With `alone` the ticket is for an idle engine that no one else gets until the batch ends. Raises the error that ended
        the pool, even while some engines still run.
        """
        ticket = uuid.uuid4().hex
        self._queued += 1
        try:
            self._begin()
            while self._callers.failure is not None or (member := self._pick(ticket, alone)) is None:
                await self._callers.change(in_line=not alone)
        finally:
            self._queued -= 1
        if not member.tickets:
            member.busy_since = time.monotonic()
        member.tickets[ticket] = rows
        member.policy_version = policy_version
        self._at[ticket] = member
        self._ready.offer(member)
        return Ticket(ticket, member.name, member.handle, self._facts)

    async def release(self, ticket: str, rows: int, tokens: int) -> None:
        """Note that a batch has ended: `rows` were answered, with `tokens` response tokens in all."""
        if member := self._at.get(ticket):
            member.count(rows, tokens)
            self._drop(member, {ticket})

    async def lost(self, engine: str, cause: str) -> None:
        """Replace an engine that a caller saw die, or whose vLLM broke."""
        if member := self._members.get(engine):
            self._bury(member, cause)

    async def resize(self, bounds: Bounds) -> None:
        """Keep the pool within other bounds from now on."""
        self._bounds = bounds
        self._begin()
        self._size()

    async def sleep(self) -> None:
        """Let go of the card that the engines share. Returns once every engine sleeps or has been ended, and no batch runs.

        Until `wake` no engine starts, no batch is taken, and no death counts. An engine that cannot sleep is ended.
        """
        self._awake = False
        while any(member.tickets for member in self._members.values()):
            await self._callers.change()
        await asyncio.gather(*(self._rest(member) for member in list(self._members.values())))

    async def wake(self) -> None:
        """Use the card again: wake the engines that sleep, and start those that are missing. Returns at once."""
        self._awake = True
        self._begin()
        for member in self._members.values():
            if member.state == "asleep":
                member.state = "waking"
                self._spawn(self._rouse(member))
        self._size()

    async def overview(self) -> PoolStatus:
        """The state of the pool now."""
        self._begin()
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
            fallback=self._facts.fallback if self._facts is not None else "",
            asleep=not self._awake,
            cannot_grow=self._starts.why,
        )

    async def close(self) -> None:
        """End all engines. Later calls raise EngineError."""
        self._callers.fail(EngineError("the pool was closed", self._setting))
        await asyncio.gather(*(self._end(member) for member in list(self._members.values())))

    # ---- members ---------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Start the task that keeps the pool's size, if there is none. A dispatcher that Ray has just restarted has none."""
        if self._sizer is None:
            self._sizer = asyncio.get_running_loop().create_task(self._keep_size())

    async def _keep_size(self) -> None:
        """Look at the size several times a second until the pool fails or is closed."""
        while self._callers.failure is None:
            try:
                self._size()
            except Exception as error:  # Ray refuses the placement, and no caller would hear of it
                log.exception("The pool cannot be sized")
                what = f"engines cannot be asked for ({type(error).__name__}: {first_line(error)})"
                self._callers.fail(EngineError(what, f"{self._setting}.placement", "Change the placement"))
            await asyncio.sleep(_SIZE_S)

    def _size(self) -> None:
        """Start or drain engines until their number fits the batches that wait or run. A pool that sleeps stays as it is."""
        if not self._awake:
            return
        batches = self._queued + sum(len(m.tickets) for m in self._members.values())
        self._sizing = sizing.resize(self._sizing, batches, self._inflight, self._bounds, self._pace, time.monotonic())
        self._fill()
        self._ready.shrink(len(self._members))
        staying = (m for m in self._members.values() if m.state != "draining")
        idle_first = sorted(staying, key=lambda m: (m.state == "serving", m.load))
        for member in idle_first[: max(0, len(idle_first) - self._sizing.target)]:
            member.state = "draining"
            self._drop(member, set())

    def _fill(self) -> None:
        """Start the engines that are missing."""
        most = self._starts.most(self._sizing.target, self._needed(), time.monotonic())
        while self._awake and self._callers.failure is None:
            if sum(m.state != "draining" for m in self._members.values()) >= most:
                return
            name = f"{self._name}-{uuid.uuid4().hex[:8]}"
            handle = self._actors.start(name, resources.placement_of(self._settings), self._inflight)
            self._members[name] = member = Member(name, handle)
            self._spawn(self._serve(member))

    async def _serve(self, member: Member) -> None:
        """Load an engine, which is watched until it ends. Failures to load are counted and may end the pool."""
        timeout = self._settings.start_timeout_s
        try:
            patience = max(timeout, asking.PLACE_S) if self._actors.nodes_may_come() else timeout
            member.pid = await asking.placed(member, patience, self._may_find_place)
            self._spawn(self._watch(member))
            facts = await asyncio.wait_for(member.handle.load.remote(*self._load_args), timeout)
            if self._settings.colocate:
                member.probed = await asking.probed(member, timeout)
        except RayTaskError as error:
            cause = error.cause
            failure = cause if isinstance(cause, EgrsdError) else EngineError(whole_cause(cause), self._setting)
            self._failed_to_load(member, failure, died=False)
        except RayError as error:  # the base class, because a death has many causes; Ray's memory monitor raises its own
            if blameless(error):
                return self._bury(member, first_line(error))
            self._failed_to_load(member, EngineError(f"its process died ({first_line(error)})", self._setting), died=True)
        except TimeoutError as error:
            what, remedy = str(error) or f"an engine did not start within {timeout:g} s", asking.SLOW
            failure = EngineError(what, self._setting, remedy)
            self._failed_to_load(member, failure, died=False)
        else:
            if not self._agrees(facts):
                return self._bury(member, "its numbers do not mean what the others' mean")
            if self._settings.colocate and (why := difference(self._probed, member.probed, facts.dtype)):
                return self._failed_to_load(member, EngineError(f"a new engine {why}", self._setting), died=True)
            self._starts.succeed()
            self._probed = self._probed or member.probed
            member.serving_since = time.monotonic()
            if member.state == "loading":
                member.state = "serving"
            self._drop(member, set())
            self._callers.notify()

    async def _rest(self, member: Member) -> None:
        """Put an engine to sleep, or end one that is still loading or cannot sleep."""
        if member.state == "serving":
            member.rest()
            if await asking.to_sleep(member, self._settings.start_timeout_s):
                return
        if member.name in self._members:
            self._leave(member)
            await self._end(member)

    async def _rouse(self, member: Member) -> None:
        """Wake an engine. Its answers count once it has answered the probe as before; else another takes its place."""
        assert self._facts is not None
        if why := await asking.to_wake(member, self._facts.dtype, self._settings.start_timeout_s):
            self._bury(member, why)
        elif member.name in self._members:
            member.rise()
            self._ready.offer(member)
            self._callers.notify()

    async def _may_find_place(self) -> bool:
        """Whether an engine's place may still come, though late: others serve, or a pool holds more engines than it keeps."""
        return self._serving() > 0 or await self._actors.others_hold_more()

    def _serving(self) -> int:
        """How many engines answer now."""
        return sum(member.state == "serving" for member in self._members.values())

    def _needed(self) -> int:
        """Engines without which the pool does not go on: its settings' least, which `egrsd scale` may lower."""
        return max(1, min(self._settings.min, self._bounds.least))

    def _agrees(self, facts: EngineFacts) -> bool:
        """Whether a new engine's facts equal those of the first. If they differ, the pool ends: such numbers must not mix."""
        self._facts = first = self._facts or facts
        if differ := disagreement(facts, first):
            remedy = "Give all engines the same vLLM and hardware, or set score.entropy: bounds"
            what = f"engines differ in what their numbers mean: an engine's {differ}"
            self._callers.fail(EngineError(what, self._setting, remedy))
        return facts == first

    async def _watch(self, member: Member) -> None:
        """Notice that an engine has died or stopped, and drop tickets that the engine has not known for a while."""
        while member.name in self._members:
            await asyncio.sleep(_WATCH_S)
            try:
                pulse = await asking.pulse(member, self._settings.stall_timeout_s, lambda: member.name not in self._members)
            except RayError as error:
                if member.serving_since is not None:  # else `_serve` hears of it, and counts a failure to load
                    self._bury(member, first_line(error))
                return
            if pulse is None:
                self._stalled(member, f"{STALLED} for {self._settings.stall_timeout_s:g} s")
                return
            member.beat(pulse)
            now = time.monotonic()
            if now - member.stepped >= self._settings.start_timeout_s:
                self._stalled(member, f"made no step for {now - member.stepped:.0f} s")
                return
            absent = set(member.tickets) - set(pulse.tickets)
            member.unseen = {ticket: member.unseen.get(ticket, now) for ticket in absent}
            self._drop(member, {ticket for ticket, since in member.unseen.items() if now - since >= _FORGET_S})

    def _stalled(self, member: Member, cause: str) -> None:
        """End an engine that has stopped. From here on it is a dead one: its callers ask again, and another takes its place."""
        if member.serving_since is None:
            self._failed_to_load(member, EngineError(f"an engine {cause} while it loaded", self._setting), died=True)
        else:
            self._bury(member, cause)

    def _failed_to_load(self, member: Member, error: EgrsdError, died: bool) -> None:
        """Replace an engine that could not load, or end the pool.

        A pool with the engines that it needs goes on. One that lacks some ends for a user's mistake. It ends for an error while
        no other engine serves, too, and after too many failed tries in a row.
        """
        if member.name not in self._members:  # the pool drained it while it loaded
            return
        enough = self._serving() >= self._needed()
        self._starts.fail(member.since, enough, str(error), time.monotonic())
        if not enough and (isinstance(error, UserError) or not (died or self._serving())):
            self._callers.fail(error)
        elif not enough and self._starts.failed >= _START_TRIES:
            what = f"{self._starts.failed} engines could not be loaded, the last one because {error.what}"
            self._callers.fail(EngineError(what, self._setting, error.remedy or "Out of memory? See the logs of the node"))
        self._bury(member, error.what)

    def _bury(self, member: Member, cause: str) -> None:
        """Take a dead or broken engine out of the pool, end its process and start another."""
        if member.name not in self._members:
            return
        self._leave(member)
        self._gone.append(Gone(member.name, cause, time.monotonic()))
        self._actors.end(member.handle)  # the process of a broken engine may still run
        if self._callers.failure is None:
            log.warning("Engine %s is gone (%s): it is replaced", member.name, cause)
        self._fill()
        self._callers.notify()

    def _leave(self, member: Member) -> None:
        """Take an engine out of the pool, and keep its seconds for the pool's totals."""
        del self._members[member.name]
        member.left = True
        for ticket in member.tickets:
            self._at.pop(ticket, None)
        now = time.monotonic()
        serving, working = self._past
        self._past = (serving + member.serving_s(now), working + member.working_s(now))

    def _drop(self, member: Member, tickets: set[str]) -> None:
        """Take tickets away from an engine, wake as many callers as now find room, and end a drained engine that is idle."""
        was_busy, room = bool(member.tickets), len(tickets)
        for ticket in tickets:
            member.tickets.pop(ticket, None)
            self._at.pop(ticket, None)
            if member.held_for == ticket:
                member.held_for, room = None, len(self._callers)
        if was_busy and not member.tickets:
            member.busy_s += time.monotonic() - member.busy_since
        if member.state == "draining" and not member.tickets and member.name in self._members:
            self._leave(member)
            self._spawn(self._end(member))
        self._ready.offer(member)
        self._callers.notify(room)

    async def _end(self, member: Member) -> None:
        """Close an engine that has left the pool, and end its process."""
        try:
            if member.pid:  # without a process Ray still looks for a place
                await asyncio.wait_for(member.handle.close.remote(), 10)
        except (TimeoutError, RayError) as error:
            log.warning("Engine %s did not close: %s", member.name, first_line(error))
        self._actors.end(member.handle)

    # ---- waiting ---------------------------------------------------------------------------------------------------

    def _pick(self, ticket: str, alone: bool) -> Member | None:
        """The engine for a ticket, or None when it must wait. With `alone` an engine is held for the ticket until it is idle."""
        if not self._awake:
            return None
        if not alone:
            return self._ready.least()
        serving = [m for m in self._members.values() if m.state == "serving" and m.held_for in (None, ticket)]
        if not serving:
            return None
        chosen = next((m for m in serving if m.held_for == ticket), min(serving, key=attrgetter("load")))
        chosen.held_for = ticket
        return None if chosen.tickets else chosen

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task, and keep a reference so that asyncio does not drop it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """End the pool when a task failed with an error of our own code, so that no caller waits for ever."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("The dispatcher failed", exc_info=error)
            self._callers.fail(EngineError(f"the pool failed ({type(error).__name__}: {first_line(error)})", self._setting))
