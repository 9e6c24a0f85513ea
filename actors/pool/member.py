"""One engine of a pool: the class that the dispatcher turns into a Ray actor, and what the dispatcher knows of it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from actors.inference import phase
from actors.pool.probe import Probed, sequence
from pipeline import config
from pipeline.contract import EngineFacts, Engines, Failure, Generate, Generation, Policy, Sampling, Score, Sequence
from pipeline.errors import EngineError, StoreError
from pipeline.fit import builds
from pipeline.live.card import Card
from pipeline.live.lease import REACH, unseen
from pipeline.store.directory import Store

RATE_S = 30.0  # tokens per second are a mean over this time
STALLED = "gave no sign of life"  # the cause of a stopped engine's end begins so

_NOT_ITS_FAULT = ("its node has died", "its owner has died")  # how Ray 2.60 words these causes of an actor's death

EngineClass = Callable[[config.Model, config.Pool, config.ScoreSettings], Engines]
LoadArgs = tuple[EngineClass, config.Model, config.Pool, config.ScoreSettings, str]  # of EngineActor.load


@dataclass(frozen=True)
class EngineStatus:
    """One engine as the dispatcher sees it."""

    name: str
    state: str  # loading, serving, draining, asleep or waking
    pid: int  # 0 until Ray has placed the actor
    batches: int  # in the engine now
    rows: int  # answered so far
    policy_version: int  # of the last batch
    seconds: float  # since the dispatcher asked Ray for it
    busy_s: float  # seconds with a batch in it, up to now
    tokens: int  # response tokens answered so far
    tokens_per_s: float  # over the last RATE_S seconds
    silent_s: float = 0.0  # since the engine was asked for a sign of life that has not come
    step_s: float = 0.0  # since its last step, while it has work
    phase: str = ""  # what it does while it loads


@dataclass(frozen=True)
class Pulse:
    """A sign of life of an engine: the tickets whose batches it holds, the steps it has made so far, and its phase."""

    tickets: list[str]
    steps: int
    phase: str = ""  # what a process does whose engine does not serve yet


@dataclass(frozen=True)
class Gone:
    """An engine that died, the cause, and the time by the dispatcher's time.monotonic()."""

    name: str
    cause: str
    at: float


@dataclass(frozen=True)
class PoolStatus:
    """A pool as its dispatcher sees it. Seconds are sums over all engines of the pool's life, dead ones included."""

    engines: list[EngineStatus]
    queued: int  # batches that wait for an engine
    least: int
    most: int
    target: int  # engines that the pool aims at, within `least` and `most`
    gone: list[tuple[str, str, float]]  # engines that died lately: (name, cause, seconds ago)
    serving_s: float  # seconds in which engines could answer
    working_s: float  # seconds in which engines had a batch
    fallback: str = ""  # why the engines give bounds where exact entropies were asked for (EngineFacts)
    asleep: bool = False  # the trainer has the turn on a shared card
    cannot_grow: str = ""  # why the last engine did not start that the pool can do without


@dataclass(frozen=True)
class Ticket:
    """The right to send one batch to one engine. `handle` is the engine's Ray actor, `facts` what its numbers mean."""

    id: str
    engine: str
    handle: Any
    facts: EngineFacts | None = None


@dataclass(eq=False)
class Member:
    """The dispatcher's record of one engine. Times are those of time.monotonic()."""

    name: str
    handle: Any
    state: str = "loading"
    pid: int = 0
    tickets: dict[str, int] = field(default_factory=dict)  # ticket id -> rows of its batch
    unseen: dict[str, float] = field(default_factory=dict)  # ticket id -> since when the engine does not know it
    silent_s: float = 0.0  # seconds for which it has owed a sign of life
    steps: int = 0  # at its last sign of life
    phase: str = ""  # at its last sign of life
    stepped: float = field(default_factory=time.monotonic)  # when it was last seen to have made a step, or to have no work
    held_for: str | None = None  # the ticket that needs this engine without other callers
    rows: int = 0
    tokens: int = 0
    answered: deque[tuple[float, int]] = field(default_factory=deque)  # (time, tokens) of the batches of the last RATE_S seconds
    policy_version: int = 0
    busy_s: float = 0.0
    busy_since: float = 0.0
    since: float = field(default_factory=time.monotonic)
    serving_since: float | None = None
    probed: Probed = field(default_factory=dict)  # what it answered to the probe, on a shared card
    asleep_s: float = 0.0  # seconds of sleep that have ended
    asleep_since: float | None = None
    left: bool = False  # it is no member of the pool any more

    @property
    def load(self) -> int:
        """Rows in the engine now."""
        return sum(self.tickets.values())

    def count(self, rows: int, tokens: int) -> None:
        """Add an answered batch to the totals."""
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens
        self.answered.append((time.monotonic(), tokens))

    def serving_s(self, now: float) -> float:
        """Seconds since the engine began to serve, without those in which it slept; 0 before that."""
        asleep = self.asleep_s + (now - self.asleep_since if self.asleep_since is not None else 0.0)
        return 0.0 if self.serving_since is None else now - self.serving_since - asleep

    def working_s(self, now: float) -> float:
        """Seconds in which the engine had a batch, up to now."""
        return self.busy_s + (now - self.busy_since if self.tickets else 0.0)

    def rest(self) -> None:
        """Note that the engine sleeps from now on."""
        self.state, self.asleep_since = "asleep", time.monotonic()

    def rise(self) -> None:
        """Note that the engine serves again."""
        assert self.asleep_since is not None
        self.asleep_s += time.monotonic() - self.asleep_since
        self.state, self.asleep_since = "serving", None

    def status(self) -> EngineStatus:
        """The engine's state for `overview`."""
        now = time.monotonic()
        while self.answered and self.answered[0][0] < now - RATE_S:
            self.answered.popleft()
        rate = sum(tokens for _, tokens in self.answered) / max(1.0, min(RATE_S, self.serving_s(now)))
        counts = (self.name, self.state, self.pid, len(self.tickets), self.rows, self.policy_version)
        stalls = (self.silent_s, now - self.stepped if self.tickets else 0.0)
        return EngineStatus(*counts, now - self.since, self.working_s(now), self.tokens, rate, *stalls, self.phase)

    def beat(self, pulse: Pulse) -> None:
        """Note a sign of life. Time in which the engine has no work is no time without a step."""
        self.phase = pulse.phase
        if pulse.steps != self.steps or not pulse.tickets:
            self.steps, self.stepped = pulse.steps, time.monotonic()


def seeing(
    store: Store, engine_class: EngineClass, model: config.Model, settings: config.Pool, score: config.ScoreSettings
) -> Engines:
    """An engine on a machine that sees the run. A node that joined after the start was asked by nobody before.

    Raises StoreError that names a node which does not see it.
    """
    if why := unseen(store):
        raise StoreError(f"node {socket.gethostname()} does not see this run ({why})", store.uri, REACH)
    return engine_class(model, settings, score)


class EngineActor:
    """One engine in a process of its own, and the tickets it works for.

    `load` is a method and not the constructor, so that its caller gets the error of a failed start as it was raised.
    """

    def __init__(self) -> None:
        self._engine: Any = None
        self._card: Card | None = None  # the one that this engine shares with the trainer
        self._patience_s = 0.0
        self._last = Policy(0)  # the last policy with an adapter that answered
        self._active: set[str] = set()
        self._lock = threading.Lock()

    def pid(self) -> int:
        """The process id. The answer also shows that Ray has placed the actor."""
        return os.getpid()

    def load(
        self, engine_class: EngineClass, model: config.Model, settings: config.Pool, score: config.ScoreSettings, card: str = ""
    ) -> EngineFacts:
        """Start the engine, and return its facts. `card` names the one that it shares with the trainer, and "" says none.

        Raises the engine's own error, UserError for code of another version, and EngineError when the card does not become free.
        """
        builds.check()
        self._card, self._patience_s = Card(card) if card else None, 0.9 * settings.start_timeout_s
        self._take_card()
        self._engine = engine_class(model, settings, score)
        return self._engine.facts()

    def probe(self) -> Probed:
        """Log-probs of a fixed sequence under the base, and under the last adapter that answered here."""
        asked = sequence(self._engine.facts())
        answers = {policy.version: self._engine.score([asked], policy)[0] for policy in {Policy(0), self._last}}
        return {version: [] if isinstance(found, Failure) else found.logprobs.tolist() for version, found in answers.items()}

    def sleep(self) -> bool:
        """Leave the shared card until `wake`. False, with nothing changed, when this engine cannot: it must end instead."""
        slept: bool = self._engine.sleep()
        if slept and self._card is not None:
            self._card.release()
        return slept

    def wake(self) -> None:
        """Use the shared card again. Raises EngineError when it does not become free, or when the engine cannot wake."""
        self._take_card()
        self._engine.wake()

    def generate(self, ticket: str, requests: list[Generate], policy: Policy, sampling: Sampling) -> list[Generation | Failure]:
        """As Engine.generate, under a ticket."""
        self._last = policy if policy.adapter is not None else self._last
        return self._under(ticket, lambda: self._engine.generate(requests, policy, sampling))

    def score(self, ticket: str, sequences: list[Sequence], policy: Policy) -> list[Score | Failure]:
        """As Engine.score, under a ticket."""
        return self._under(ticket, lambda: self._engine.score(sequences, policy))

    def pulse(self) -> Pulse:
        """A sign of life. A method of its own thread answers, also while the engine loads or makes a long step."""
        with self._lock:
            return Pulse(list(self._active), getattr(self._engine, "steps", 0), phase.now())

    def close(self) -> None:
        """Stop the engine and free its memory."""
        if self._engine is not None:
            self._engine.close()

    def _take_card(self) -> None:
        if self._card is not None and not self._card.take(self._patience_s):
            what = f"process {self._card.holder()} held the card of engine and trainer for {self._patience_s:.0f} s"
            raise EngineError(
                what, "engines.rollout.colocate", "Raise start_timeout_s if a round trains longer, or end that process"
            )

    def _under(self, ticket: str, call: Callable[[], list[Any]]) -> list[Any]:
        """The answers of `call`, with `ticket` among the active ones meanwhile."""
        with self._lock:
            self._active.add(ticket)
        try:
            return call()
        finally:
            with self._lock:
                self._active.discard(ticket)


def blameless(error: BaseException) -> bool:
    """Whether an engine ended because its node or its dispatcher did. Such a death is held against no engine and no row."""
    return any(cause in str(error) for cause in _NOT_ITS_FAULT)
