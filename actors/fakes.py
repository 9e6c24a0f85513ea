"""A deterministic fake of the engine, for tests of everything around it: same constructor, same methods, no vLLM.

`token_evidence` computes log-prob and entropy from token k, position t, policy version v and prompt length P:

    logprob  = -(1 + (7 k + 5 t + 11 v + 3 P) mod 97) / 50            in [-1.94, -0.02] nats;
    entropy  = log(V) * ((13 k + 3 t + 17 v + 5 P) mod 101) / 100     in [0, log V] nats.

`most_likely` gives the K most likely tokens beside it: the token itself with its log-prob, and the tokens k + 1, k + 2, ... mod V
with a half, a quarter, ... of what is left. Scoring a generated trace under the same prompt and policy thus gives the same
numbers again, as with a real engine. `trace` draws the tokens from the seed. A fake engine can be slow, and it can die on
purpose.

The fake ships with the package because Ray workers cannot import test modules. Give it to a pool as
`functools.partial(FakeEngine, behaviour=Behaviour(...))`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass, field

import numpy as np

from pipeline import config
from pipeline.contract import EngineFacts, Failure, Generate, Generation, Policy, Sampling, Score, Sequence, Usage
from pipeline.errors import EgrsdError, EngineError, ModelError

END_TOKEN = 2
UNWATCHED = ("train.logprob_gap=99", "train.logprob_gap_max=99")  # settings for a real trainer: these log-probs are no model's


@dataclass(frozen=True)
class Behaviour:
    """How a fake engine behaves: its delays in seconds, and its ways to fail."""

    start_s: float = 0.0
    batch_s: float = 0.0
    token_s: float = 0.0
    in_turn: bool = False  # the engine answers one batch after the other, so that its speed has a limit
    vocab_size: int = 57
    poison_seeds: frozenset[int] = field(default_factory=frozenset)  # a request with such a seed kills the process
    poison_prompts: frozenset[int] = field(default_factory=frozenset)  # so does a prompt that begins with such an id
    start_error: EgrsdError | None = None
    ask_error: EgrsdError | None = None  # whoever asks for answers gets it
    start_kills: bool = False  # the process dies while the engine starts
    wrong_adapter: str | None = None  # this adapter is refused with ModelError
    falls_back: str | None = None  # where this file exists at the start, the engine has bounds instead of exact entropies
    sleeps: bool = False  # the engine can sleep; else a pool must end it
    wakes_wrong: bool = False  # after its sleep every token has the log-prob -log V


class FakeEngine:
    """An engine whose answers come from the formulas above. `behaviour` sets its delays and failures."""

    def __init__(
        self,
        model: config.Model,
        pool: config.Pool,  # noqa: ARG002  (the signature is that of Engine)
        score: config.ScoreSettings,
        behaviour: Behaviour = Behaviour(),
    ) -> None:
        time.sleep(behaviour.start_s)
        if behaviour.start_kills:
            _die()
        if behaviour.start_error is not None:
            raise behaviour.start_error
        score.check_vocabulary(behaviour.vocab_size)
        self._model, self._behaviour, self._keep_topk = model, behaviour, score.keep_topk
        self.steps = 0  # batches answered
        self._asleep = self._wrong = False
        self._turn = threading.Lock() if behaviour.in_turn else contextlib.nullcontext()
        self._exact = score.entropy == "exact" and not (behaviour.falls_back and os.path.exists(behaviour.falls_back))
        self._fallback = "the fake was told so" if score.entropy == "exact" and not self._exact else ""
        if self._fallback and not score.fallback:
            raise EngineError("exact entropies are not available", "fake", "Let bounds take their place: score.fallback=true")

    def facts(self) -> EngineFacts:
        """The facts of a real engine, with "fake" as the engine's name."""
        method = "exact" if self._exact else "bounds"
        window, vocab = self._model.max_model_len, self._behaviour.vocab_size
        return EngineFacts(method, "raw_logprobs", self._model.dtype, "fake", window, vocab, fallback=self._fallback)

    def generate(self, requests: list[Generate], policy: Policy, sampling: Sampling) -> list[Generation | Failure]:
        """One computed trace per request, in order. A prompt that fills the window becomes a Failure."""
        self._suffer(policy, [r.prompt for r in requests], {r.seed for r in requests})
        answers = [self._write(request, policy, sampling) for request in requests]
        self._take_time(sum(len(a.tokens) for a in answers if isinstance(a, Generation)))
        return answers

    def score(self, sequences: list[Sequence], policy: Policy) -> list[Score | Failure]:
        """Computed log-probs and entropies of every response token, in nats."""
        self._suffer(policy, [s.prompt for s in sequences], set())
        answers = [self._read(sequence, policy) for sequence in sequences]
        self._take_time(sum(len(s.response) for s in sequences))
        return answers

    def usage(self) -> Usage:
        """The usage of a pool with this one engine, whose work takes no time."""
        return Usage({}, 0.0, 1)

    def sleep(self) -> bool:
        """Whether the engine sleeps now. It then refuses to answer until it is woken."""
        self._asleep = self._behaviour.sleeps
        return self._asleep

    def wake(self) -> None:
        """Answer again, as `behaviour` says."""
        self._wrong = self._asleep and self._behaviour.wakes_wrong
        self._asleep = False

    def close(self) -> None:
        """Do nothing: a fake engine holds no memory."""

    def _write(self, request: Generate, policy: Policy, sampling: Sampling) -> Generation | Failure:
        room = self._model.max_model_len - len(request.prompt)
        if room < 1:
            return Failure(f"prompt of {len(request.prompt)} tokens leaves no room in model.max_model_len")
        tokens, ended = trace(request.seed, policy.version, min(sampling.max_new_tokens, room), self._behaviour.vocab_size)
        logprobs, entropy = token_evidence(tokens, policy.version, len(request.prompt), self._behaviour.vocab_size)
        return Generation(tokens, logprobs, entropy, self._error(), "stop" if ended else "length", policy.version)

    def _read(self, sequence: Sequence, policy: Policy) -> Score | Failure:
        if not sequence.response or len(sequence.prompt) + len(sequence.response) > self._model.max_model_len:
            return Failure("empty response" if not sequence.response else "prompt and response exceed model.max_model_len")
        tokens = np.asarray(sequence.response, dtype=np.int32)
        logprobs, entropy = token_evidence(tokens, policy.version, len(sequence.prompt), self._behaviour.vocab_size)
        if self._wrong:
            logprobs = np.full_like(logprobs, -np.log(self._behaviour.vocab_size))
        kept = most_likely(tokens, logprobs, self._keep_topk, self._behaviour.vocab_size) if self._keep_topk else ()
        return Score(tokens, logprobs, entropy, self._error(), *kept)

    def _error(self) -> float:
        return 0.0 if self._exact else 0.01

    def _suffer(self, policy: Policy, prompts: list[list[int]], seeds: set[int]) -> None:
        """Fail as `behaviour` asks: raise its error or ModelError for the wrong adapter, or kill the process for a poisonous row.

        Raises EngineError while the engine sleeps.
        """
        if self._asleep:
            raise EngineError("the engine sleeps", "fake")
        if self._behaviour.ask_error is not None:
            raise self._behaviour.ask_error
        if policy.adapter is not None and policy.adapter == self._behaviour.wrong_adapter:
            raise ModelError("the adapter does not fit", policy.adapter, "Use another")
        first_ids = {prompt[0] for prompt in prompts if prompt}
        if seeds & self._behaviour.poison_seeds or first_ids & self._behaviour.poison_prompts:
            _die()

    def _take_time(self, num_tokens: int) -> None:
        with self._turn:
            time.sleep(self._behaviour.batch_s + num_tokens * self._behaviour.token_s)
        self.steps += 1


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def trace(seed: int, version: int, max_new_tokens: int, vocab_size: int) -> tuple[np.ndarray, bool]:
    """(tokens int32 [T], whether END_TOKEN is the last) for a seed and a policy version. T is at most 24 and `max_new_tokens`."""
    rng = np.random.Generator(np.random.Philox(key=[seed % 2**63, version]))
    length = int(rng.integers(1, 25))
    tokens = rng.integers(min(4, vocab_size - 1), vocab_size, size=length).astype(np.int32)
    tokens[-1] = END_TOKEN
    return tokens[:max_new_tokens], length <= max_new_tokens


def token_evidence(tokens: np.ndarray, version: int, prompt_length: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(log-probs, entropies) float32 [T] nats of tokens int32 [T], by the formulas above."""
    k, t = tokens.astype(np.int64), np.arange(len(tokens))
    logprobs = -(1 + (7 * k + 5 * t + 11 * version + 3 * prompt_length) % 97) / 50
    entropy = np.log(vocab_size) * ((13 * k + 3 * t + 17 * version + 5 * prompt_length) % 101) / 100
    return logprobs.astype(np.float32), entropy.astype(np.float32)


def most_likely(tokens: np.ndarray, logprobs: np.ndarray, keep: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32, log-probs float32 nats) [T, keep] of the most likely tokens at each position, by the rule above."""
    places = np.arange(keep)
    ids = (tokens[:, None].astype(np.int64) + places) % vocab_size
    rest = np.log1p(-np.exp(logprobs.astype(np.float64)))[:, None] - places[1:] * np.log(2)
    values = np.concatenate((logprobs[:, None], rest), axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    taken = (np.take_along_axis(found, order, axis=1) for found in (ids, values))
    return next(taken).astype(np.int32), next(taken).astype(np.float32)
