"""A teacher at a vLLM server: the same methods as an engine, over HTTP (`prompt_logprobs=k`, `max_tokens=1`).

vLLM's HTTP gives the k most likely tokens of a position, and no entropy. Entropies are the middle of the bounds that these tokens
allow, with the half-width beside them. A server whose environment has this project, and EGRSD_EXACT_ENTROPY=served, gives exact
ones: actors/inference/hooks/exact_entropy.py then puts the entropy where the k-th best token would stand. It is recognised by a
handshake: the tokens of the prompt have rank 0, which vLLM never gives, and the entropies lie within the bounds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np

from actors.pool.probe import disagreement
from actors.server import Broken, Refused, Server
from pipeline import config
from pipeline.contract import EngineFacts, Failure, Generate, Generation, Policy, Sampling, Score, Sequence
from pipeline.errors import EngineError, ModelError, SettingError
from pipeline.method.bounds import bounds
from pipeline.models.tokenizers.agreement import shared_size
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.notices import NOTICE_S, late
from pipeline.store.possible import limits

T = TypeVar("T")
_SAMPLE = 48  # ids of the handshake
# Sampling that this project does not have. A server takes what a request leaves out from the model's generation configuration.
_PLAIN = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_SLACK = 2e-2  # nats by which an entropy may leave its bounds: a server may compute in half precision


class Position(NamedTuple):
    """What a server says of one position: the token's log-prob, the best tokens (likeliest first), and perhaps the entropy."""

    logprob: float
    tokens: list[int]
    logprobs: list[float]
    entropy: float | None


def check_servers(run: config.Run) -> None:
    """Ask the server of every served teacher from this process, before anything starts. Raises what `Served` raises."""
    for name, teacher in run.teachers.items():
        if teacher.server:
            with late(f"server of {name}", f"waiting for {teacher.server}, which is teacher {name}, for {NOTICE_S:g} s so far."):
                Served(name, teacher, run.model_of(teacher), run.pool_of(teacher), run.score).close()


class Served:
    """The client of one server. Its constructor checks the server, and raises a one-line error for one that does not fit."""

    def __init__(
        self,
        name: str,
        teacher: config.Teacher,
        model: config.Model,
        pool: config.Pool,  # noqa: ARG002  (the signature is that of Engine behind its teacher)
        score: config.ScoreSettings,
    ) -> None:
        self._name, self._teacher, self._model, self._keep = name, teacher, model, score.keep_topk
        self._server, self._tokenizer = Server(name, teacher), tokenizer_of(model)
        self._vocab = shared_size(self._tokenizer)
        self._workers = ThreadPoolExecutor(teacher.concurrency, thread_name_prefix="egrsd-served")
        self.steps, self._counting = 0, threading.Lock()
        self._top_k = min(max(2, teacher.top_k, score.keep_topk), self._vocab)  # best tokens that are asked for with bounds
        self._served, self._facts = self._meet()
        self._window, self._exact = self._facts.max_model_len, self._facts.entropy_method == "exact"
        self._k = self._keep + 1 if self._exact else self._top_k  # an exact entropy takes the place of the last

    def facts(self) -> EngineFacts:
        """What the server's numbers mean. It does not tell its dtype."""
        return self._facts

    def generate(self, requests: list[Generate], policy: Policy, sampling: Sampling) -> list[Generation | Failure]:
        """One trace per request, in order. Its numbers come from scoring it, so that they are raw and at temperature 1.

        Raises EngineError as `score` does.
        """
        self._meet_again()
        return self._all(lambda request: self._write(request, policy, sampling), requests)

    def score(self, sequences: list[Sequence], policy: Policy) -> list[Score | Failure]:  # noqa: ARG002  (it has one policy)
        """Log-prob and entropy of every response token, in nats. A sequence that the server refuses becomes a Failure.

        Raises EngineError when the server has been started again, and its numbers do not mean what they meant.
        """
        self._meet_again()
        return self._all(self._score_one, sequences)

    def close(self) -> None:
        """End the threads that ask."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _all(self, ask: Callable[[Any], T], items: list[Any]) -> list[T | Failure]:
        """The answers to some requests, in order. At most `concurrency` of them are with the server, over all callers."""

        def counted(item: Any) -> T | Failure:
            """Ask, and count the answer as a step. A row that breaks a server which is well otherwise is a Failure."""
            try:
                answer: T | Failure = ask(item)
            except Broken as error:
                self._meet()
                answer = Failure(f"the server fails at it: {error.what}")
            self._count()
            return answer

        return list(self._workers.map(counted, items))

    def _count(self) -> None:
        """Count a step: the pool ends a client that makes none for too long."""
        with self._counting:
            self.steps += 1

    def _score_one(self, sequence: Sequence) -> Score | Failure:
        if not sequence.response:
            return Failure("empty response")
        ids = [*sequence.prompt, *sequence.response]
        if len(ids) > self._window:
            return Failure(f"prompt and response of {len(ids)} tokens exceed the window {self._window} of the teacher")
        try:
            positions = self._positions(ids, len(sequence.prompt), self._k)
        except Refused as error:
            return Failure(f"the server refuses it: {error}")
        return self._to_score(positions, sequence.response)

    def _write(self, request: Generate, policy: Policy, sampling: Sampling) -> Generation | Failure:
        room = self._window - len(request.prompt)
        if room < 1:
            return Failure(f"prompt of {len(request.prompt)} tokens leaves no room in the window {self._window} of the teacher")
        chosen = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "seed": request.seed,
            **_PLAIN,
        }
        asked = {"model": self._served, "prompt": request.prompt, "return_token_ids": True}
        body = asked | chosen | {"max_tokens": min(sampling.max_new_tokens, room)}
        try:
            choice = self._choice(self._server.post("/v1/completions", body))
        except Refused as error:
            return Failure(f"the server refuses it: {error}")
        self._count()
        tokens = choice.get("token_ids")
        if not isinstance(tokens, list):
            raise ModelError("the server gives no token ids of what it writes", self._server.where, "Use a newer vLLM")
        scored = self._score_one(Sequence(request.prompt, tokens))
        if isinstance(scored, Failure):
            return scored
        ended = "length" if choice.get("finish_reason") == "length" else "stop"
        return Generation(scored.tokens, scored.logprobs, scored.entropy, scored.entropy_error, ended, policy.version)

    def _positions(self, ids: list[int], first: int, k: int) -> list[Position]:
        """What it says of every token of `ids` from place `first` on. Raises Refused or, for a strange answer, ModelError."""
        found = self._prompt_logprobs(self._served, ids, k)
        return [self._position(place, token, k, self._exact) for place, token in zip(found[first:], ids[first:], strict=True)]

    def _prompt_logprobs(self, model: str, ids: list[int], k: int) -> list[Any]:
        """What the server says of every place of a prompt, unread. Raises as `_positions` does."""
        body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": k}
        found = self._choice(self._server.post("/v1/completions", body)).get("prompt_logprobs")
        if not isinstance(found, list) or len(found) != len(ids):
            given = f"{len(found)} positions" if isinstance(found, list) else "no log-probs"
            what = f"the server gave {given} for a prompt of {len(ids)} ids"
            raise ModelError(what, self._server.where, "It must be a vLLM server that takes token ids and prompt_logprobs")
        return found

    def _choice(self, answer: dict[str, Any]) -> dict[str, Any]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise ModelError("the server's answer has no choices", self._server.where, "It must speak the OpenAI completions API")
        return choices[0]

    def _position(self, place: Any, token: int, k: int, exact: bool) -> Position:
        try:
            entries = {int(key): (float(entry["logprob"]), int(entry["rank"])) for key, entry in place.items()}
            own, own_rank = entries[token]
        except (AttributeError, KeyError, TypeError, ValueError):
            what = f"the server's log-probs lack the token {token} of the prompt, its log-prob or its rank"
            raise ModelError(what, self._server.where, "It must be a vLLM server that takes token ids") from None
        if own_rank == 0 and not exact:
            raise self._other("it gives exact entropies, and gave none")
        ranked = sorted((rank, key, value) for key, (value, rank) in entries.items() if 1 <= rank <= k)
        entropy = ranked.pop()[2] if exact and ranked and ranked[-1][0] == k else None
        return Position(own, [key for _, key, _ in ranked], [value for _, _, value in ranked], entropy)

    def _to_score(self, positions: list[Position], response: list[int]) -> Score:
        """The numbers of a response. Raises EngineError when the server gives log-probs in the place of exact entropies."""
        logprobs = np.array([position.logprob for position in positions], np.float32)
        best = min(len(position.tokens) for position in positions)
        kept: tuple[np.ndarray, ...] = ()
        if self._keep:
            if best < self._keep:
                raise EngineError(f"the server gave {best} of the {self._keep} best tokens", self._server.where)
            rows = ([p.tokens[: self._keep] for p in positions], [p.logprobs[: self._keep] for p in positions])
            kept = (np.array(rows[0], np.int32), np.array(rows[1], np.float32))
        tokens = np.array(response, np.int32)
        if self._exact:
            entropy = np.array([np.nan if p.entropy is None else p.entropy for p in positions], np.float32)
            if (entropy < limits("entropy")[0]).any():  # no NaN: that is a fault of its row
                raise self._other(f"an exact entropy is {np.nanmin(entropy):.3g} nat, which is a log-prob")
            return Score(tokens, logprobs, entropy, 0.0, *kept)
        lower, upper = bounds(np.array([p.logprobs[:best] for p in positions]), self._vocab)
        width = float(((upper - lower) / 2).max(initial=0.0))
        return Score(tokens, logprobs, ((lower + upper) / 2).astype(np.float32), width, *kept)

    # ---- the checks at the start, and before each batch --------------------------------------------------------------

    def _meet(self) -> tuple[str, EngineFacts]:
        """(the model's name at the server, what the server's numbers mean). Raises what the constructor raises."""
        served, window, version = self._find_model()
        method = "exact" if self._shakes_hands_exactly(served, window) else "bounds"
        return served, EngineFacts(method, "raw_logprobs", "unknown", f"vllm {version}, served", window, self._vocab)

    def _meet_again(self) -> None:
        """Raise EngineError when the server is another one than at the start, for someone may have started it again."""
        served, facts = self._workers.submit(self._meet).result()
        self._count()
        if served != self._served:
            raise self._other(f"it serves '{served}', and served '{self._served}'")
        if differ := disagreement(facts, self._facts, "the server's at the start"):
            raise self._other(f"its {differ}")

    def _other(self, what: str) -> EngineError:
        """The error of a server whose numbers do not mean what they meant at the start."""
        remedy = "Start it again as it was, or with what it should be from now on, and resume"
        return EngineError(f"the server has changed: {what}", self._server.where, remedy)

    def _find_model(self) -> tuple[str, int, str]:
        """(model's name at the server, its window, version of vLLM). Raises ModelError when the server lacks the model."""
        served = self._server.get("/v1/models").get("data")
        models = {str(m.get("id")): m for m in served if isinstance(m, dict)} if isinstance(served, list) else {}
        wanted = self._teacher.served_model
        if not wanted and len(models) == 1:
            wanted = next(iter(models))
        if wanted not in models:
            what = f"the server does not serve '{wanted}'" if wanted else f"the server has {len(models)} models"
            listed = ", ".join(sorted(models)) or "none"
            raise ModelError(what, self._server.where, f"It serves: {listed}. Name one in teachers.{self._name}.served_model")
        window = models[wanted].get("max_model_len")
        try:
            version = str(self._server.get("/version").get("version", "unknown"))
        except (ModelError, Refused):
            version = "unknown"
        # Scoring makes the server sample one token, which needs a position of its own.
        room = min(int(window) - 1, self._model.max_model_len) if isinstance(window, int) else self._model.max_model_len
        return wanted, room, version

    def _shakes_hands_exactly(self, served: str, window: int) -> bool:
        """Check that the ids mean the same at the server, and that it gives enough log-probs. True for exact entropies."""
        count = max(2, min(_SAMPLE, window - 1))
        ids = sorted({int(number) for number in np.linspace(0, self._vocab - 1, count)})
        ids = ids[::-1]  # an order that no model expects, so that most tokens are unlikely
        try:
            found = self._prompt_logprobs(served, ids, self._top_k)
        except Refused as error:
            self._explain(str(error))
        self._check_texts(found, ids)
        exact = any((place.get(str(token)) or {}).get("rank") == 0 for place, token in zip(found[1:], ids[1:], strict=True))
        if exact:
            read = (self._position(place, token, self._top_k, exact) for place, token in zip(found[1:], ids[1:], strict=True))
            self._check_entropies(list(read))
        return exact

    def _explain(self, said: str) -> NoReturn:
        if "logprobs" in said:
            remedy = f"Start it with --max-logprobs {self._top_k}, or lower teachers.{self._name}.top_k (and score.keep_topk)"
            what = f"the server gives fewer log-probs than {self._top_k}: {said}"
            raise SettingError(what, f"teachers.{self._name}.top_k", remedy)
        what = f"the server refuses a prompt with the first and last ids of this tokenizer: {said}"
        raise ModelError(what, self._server.where, f"It must serve the model of teachers.{self._name}.model")

    def _check_texts(self, found: list[Any], ids: list[int]) -> None:
        """Raise ModelError, with the first difference, when an id has another text at the server."""
        for place, token in list(zip(found, ids, strict=True))[1:]:
            theirs = (place.get(str(token)) or {}).get("decoded_token") if isinstance(place, dict) else None
            ours = self._tokenizer.decode([token])
            if isinstance(theirs, str) and "�" not in ours + theirs and ours.strip() != theirs.strip():
                what = f"its tokenizer is not that of {self._model.path}: id {token} is {ours!r}, and at the server {theirs!r}"
                raise ModelError(what, self._server.where, "Let the server serve the model of the settings, or change the model")

    def _check_entropies(self, positions: list[Position]) -> None:

        lower, upper = bounds(np.array([position.logprobs for position in positions]), self._vocab)
        exact = np.array([np.nan if position.entropy is None else position.entropy for position in positions])
        if not bool(np.all((exact >= lower - _SLACK) & (exact <= upper + _SLACK))):
            what = "its exact entropies lie outside the bounds that its own log-probs allow"
            raise EngineError(what, self._server.where, "Start it with the project's code of now, or without EGRSD_EXACT_ENTROPY")
