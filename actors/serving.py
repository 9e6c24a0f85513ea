"""The process of one engine, as a plain class that the pool turns into a Ray actor, and what is said about it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline import config
from pipeline.contract import EngineFacts, Engines, Failure, Generate, Generation, Policy, Sampling, Score, Sequence

EngineClass = Callable[[config.Model, config.Pool, config.ScoreSettings], Engines]


@dataclass(frozen=True)
class EngineStatus:
    """One engine as the dispatcher sees it.

    state: loading, serving or draining; rows: answered so far; seconds: since it entered its state; busy_s: of its life with at
    least one batch in it, up to the last batch that ended.
    """

    name: str
    state: str
    pid: int
    batches: int
    rows: int
    policy_version: int
    seconds: float
    busy_s: float


@dataclass(frozen=True)
class Lease:
    """The right to send one batch to one engine."""

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
    leases: dict[str, int] = field(default_factory=dict)  # id -> rows
    unseen: set[str] = field(default_factory=set)  # leases the engine did not know at the last look
    held_for: str | None = None  # the lease that wants this engine for itself
    rows: int = 0
    policy_version: int = 0
    busy_s: float = 0.0
    busy_since: float = 0.0
    since: float = field(default_factory=time.monotonic)

    @property
    def load(self) -> int:
        """Rows it holds now."""
        return sum(self.leases.values())

    def status(self) -> EngineStatus:
        """What is told about it."""
        age = time.monotonic() - self.since
        return EngineStatus(self.name, self.state, self.pid, len(self.leases), self.rows, self.policy_version, age, self.busy_s)


class EngineActor:
    """One engine and the leases it works for. Loading is a call, not the constructor: so its error arrives as raised."""

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

    def generate(self, lease: str, requests: list[Generate], policy: Policy, sampling: Sampling) -> list[Generation | Failure]:
        """As Engine.generate, under a lease."""
        return self._under(lease, lambda: self._engine.generate(requests, policy, sampling))

    def score(self, lease: str, sequences: list[Sequence], policy: Policy) -> list[Score | Failure]:
        """As Engine.score, under a lease."""
        return self._under(lease, lambda: self._engine.score(sequences, policy))

    def active(self) -> list[str]:
        """Leases whose batches are in the engine."""
        with self._lock:
            return list(self._active)

    def close(self) -> None:
        """Free the engine."""
        if self._engine is not None:
            self._engine.close()

    def _under(self, lease: str, work: Callable[[], list[Any]]) -> list[Any]:
        with self._lock:
            self._active.add(lease)
        try:
            return work()
        finally:
            with self._lock:
                self._active.discard(lease)
