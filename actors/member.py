"""One engine of a pool: its process (a plain class that the dispatcher turns into a Ray actor), and what is known of it."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline import config
from pipeline.contract import EngineFacts, Engines, Failure, Generate, Generation, Policy, Sampling, Score, Sequence

RATE_S = 30.0

_NOT_ITS_FAULT = ("its node has died", "its owner has died")  # how Ray 2.60 words these causes of an actor's death

EngineClass = Callable[[config.Model, config.Pool, config.ScoreSettings], Engines]


@dataclass(frozen=True)
class EngineStatus:
    """One engine as the dispatcher sees it.

    state: loading, serving or draining; pid: 0 until Ray has found a place for it; batches: in it now; rows, tokens: answered so
    far; tokens_per_s: over the last RATE_S seconds; seconds: since it was asked for; busy_s: of its life with at least one batch
    in it, up to the last batch that ended.
    """

    name: str
    state: str
    pid: int
    batches: int
    rows: int
    policy_version: int
    seconds: float
    busy_s: float
    tokens: int
    tokens_per_s: float


@dataclass(frozen=True)
class Gone:
    """An engine that died, why, and when (time.monotonic of the dispatcher)."""

    name: str
    cause: str
    at: float


@dataclass(frozen=True)
class PoolStatus:
    """A pool as its dispatcher sees it.

    queued: batches that wait for an engine; least, most: its bounds, target: engines aimed at; gone: engines that died lately,
    as (name, cause, seconds ago). serving_s, working_s: seconds of its life added up over engines, the living and the dead,
    that could answer, and that had a batch in them.
    """

    engines: list[EngineStatus]
    queued: int
    least: int
    most: int
    target: int
    gone: list[tuple[str, str, float]]
    serving_s: float
    working_s: float


@dataclass(frozen=True)
class Ticket:
    """The right to send one batch to one engine; `handle` is its actor."""

    id: str
    engine: str
    handle: Any


@dataclass(eq=False)
class Member:
    """One engine as the dispatcher keeps it. Times are of time.monotonic()."""

    name: str
    handle: Any
    state: str = "loading"
    pid: int = 0
    tickets: dict[str, int] = field(default_factory=dict)  # id -> rows
    unseen: dict[str, float] = field(default_factory=dict)  # tickets the engine does not know, and since when
    held_for: str | None = None  # the ticket that wants this engine for itself
    rows: int = 0
    tokens: int = 0
    answered: deque[tuple[float, int]] = field(default_factory=deque)  # tokens of the last RATE_S seconds, by time
    policy_version: int = 0
    busy_s: float = 0.0
    busy_since: float = 0.0
    since: float = field(default_factory=time.monotonic)
    serving_since: float | None = None

    @property
    def load(self) -> int:
        """Rows it holds now."""
        return sum(self.tickets.values())

    def count(self, rows: int, tokens: int) -> None:
        """A batch was answered."""
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens
        self.answered.append((time.monotonic(), tokens))

    def serving_s(self, now: float) -> float:
        """Seconds since it could answer."""
        return 0.0 if self.serving_since is None else now - self.serving_since

    def working_s(self, now: float) -> float:
        """Seconds with a batch in it, the one in it now included."""
        return self.busy_s + (now - self.busy_since if self.tickets else 0.0)

    def status(self) -> EngineStatus:
        """What is told about it."""
        now = time.monotonic()
        while self.answered and self.answered[0][0] < now - RATE_S:
            self.answered.popleft()
        rate = sum(tokens for _, tokens in self.answered) / max(1.0, min(RATE_S, self.serving_s(now)))
        counts = (self.name, self.state, self.pid, len(self.tickets), self.rows, self.policy_version)
        return EngineStatus(*counts, now - self.since, self.busy_s, self.tokens, rate)


class EngineActor:
    """One engine and the tickets it works for. Loading is a call, not the constructor: so its error arrives as raised."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._active: set[str] = set()
        self._lock = threading.Lock()

    def pid(self) -> int:
        """This process, once Ray has placed the actor."""
        return os.getpid()

    def load(
        self, engine_class: EngineClass, model: config.Model, settings: config.Pool, score: config.ScoreSettings
    ) -> EngineFacts:
        """Start the engine. Raises what it raises."""
        self._engine = engine_class(model, settings, score)
        return self._engine.facts()

    def generate(self, ticket: str, requests: list[Generate], policy: Policy, sampling: Sampling) -> list[Generation | Failure]:
        """As Engine.generate, under a ticket."""
        return self._under(ticket, lambda: self._engine.generate(requests, policy, sampling))

    def score(self, ticket: str, sequences: list[Sequence], policy: Policy) -> list[Score | Failure]:
        """As Engine.score, under a ticket."""
        return self._under(ticket, lambda: self._engine.score(sequences, policy))

    def active(self) -> list[str]:
        """Leases whose batches are in the engine."""
        with self._lock:
            return list(self._active)

    def close(self) -> None:
        """Free the engine."""
        if self._engine is not None:
            self._engine.close()

    def _under(self, ticket: str, work: Callable[[], list[Any]]) -> list[Any]:
        with self._lock:
            self._active.add(ticket)
        try:
            return work()
        finally:
            with self._lock:
                self._active.discard(ticket)


def blameless(error: BaseException) -> bool:
    """Whether an engine ended with its machine or its dispatcher: then neither its start nor what it was asked is to blame."""
    return any(cause in str(error) for cause in _NOT_ITS_FAULT)
