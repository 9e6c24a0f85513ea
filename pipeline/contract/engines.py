"""What stages and engines say to each other.

A stage asks an engine with `Generate` or `Sequence`. It gets back a `Generation`, a `Score` or a `Failure`. Real engines and
fakes share this signature, and stages import neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Policy:
    """Which policy must answer: base weights plus the adapter at `adapter` (a URI), or the base alone when it is None.

    With `model.tuning` full, whole weights lie at `adapter`.
    """

    version: int
    adapter: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How traces are sampled. Log-probs and entropies that come back are always raw, at temperature 1."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


@dataclass(frozen=True)
class Generate:
    """One trace to write: the ids of its prompt, and its seed. Prompt, seed and policy decide the trace."""

    prompt: list[int]
    seed: int


@dataclass(frozen=True)
class Sequence:
    """One response to score under one prompt."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True, eq=False)
class Generation:
    """One written trace: tokens int32 [T], logprobs float32 [T] nats, entropy float32 [T] nats.

    Log-probs and entropies are those of the distribution that wrote the tokens. entropy_error: largest half-width in nats of the
    entropy bounds, 0 when exact.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    entropy: np.ndarray
    entropy_error: float
    finish_reason: str
    policy_version: int


@dataclass(frozen=True, eq=False)
class Score:
    """One scored response: tokens int32 [T] as the engine saw them, logprobs float32 [T] nats, entropy float32 [T] nats.

    entropy_error: largest half-width in nats of the entropy bounds, 0 when exact.
    topk_tokens int32 [T, K], topk_logprobs float32 [T, K] nats: the K most likely tokens at each position, the likeliest first,
    where K is score.keep_topk. None without it.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    entropy: np.ndarray
    entropy_error: float
    topk_tokens: np.ndarray | None = None
    topk_logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class Failure:
    """One request that an engine could not answer. The other requests of its batch were answered."""

    cause: str


@dataclass(frozen=True)
class EngineFacts:
    """What the numbers of an engine mean. They are stored with the data, and stage `score` refuses an engine with other facts.

    scoring: the positions of a scored sequence that go through the output head. `prompt`: all. `response`: those that predict
    its response. `shared`: the latter, by an engine that lets sequences with the same prompt share its keys and values.
    fallback: why exact entropies were asked for and are not there. Empty when they are there, or when bounds were asked for.
    """

    entropy_method: str  # exact | bounds
    logprobs_mode: str  # raw_logprobs
    dtype: str
    engine: str  # "vllm 0.32.0"
    max_model_len: int
    vocab_size: int
    scoring: str = "prompt"
    fallback: str = field(default="", compare=False)


class Engines(Protocol):
    """Inference as the stages see it: one engine, or a pool of engines. Answers keep the order of the requests."""

    def facts(self) -> EngineFacts:
        """The facts of the engines, which are the same for all of them."""
        ...

    def generate(self, requests: list[Generate], policy: Policy, sampling: Sampling) -> list[Generation | Failure]:
        """Write one trace per request with `policy`."""
        ...

    def score(self, sequences: list[Sequence], policy: Policy) -> list[Score | Failure]:
        """Measure log-prob and entropy of every response token under `policy`, at temperature 1."""
        ...


@dataclass(frozen=True)
class Usage:
    """What the engines of one or more pools have done so far.

    busy_s: seconds of work of each engine, by pool and by the engine's name. A batch that is not answered yet counts up to now.
    idle_s: seconds without work, added up over the engines that could answer.
    most: engines that the largest pool may have now.
    """

    busy_s: dict[str, dict[str, float]]
    idle_s: float
    most: int

    def busiest_since(self, before: Usage) -> float:
        """Seconds of work of the busiest engine of each pool since `before`, added up. An engine may have come in between."""
        return sum(
            max((seconds - before.busy_s.get(pool, {}).get(name, 0.0) for name, seconds in engines.items()), default=0.0)
            for pool, engines in self.busy_s.items()
        )


class PooledEngines(Engines, Protocol):
    """Inference as the driver sees it: a pool that also says what its engines have done."""

    def usage(self) -> Usage:
        """What the engines of this pool have done so far."""
        ...

    def sleep(self) -> object:
        """Free the card that the engines share with the trainer. Returns once they have. Without such a card nothing happens."""
        ...

    def wake(self) -> None:
        """Let engines that sleep answer again. Call it when the trainer has left the card. Engines that are awake stay so."""
        ...
