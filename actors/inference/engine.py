"""One vLLM engine as a plain class: it writes traces and scores responses, with log-prob and exact entropy of every token.

`generate` and `score` block, and many threads may call them at once. One thread owns vLLM (stepping.py): it takes requests in
as they come and steps them together. Traces of different callers therefore share batches (continuous batching).

The base model without an adapter is the teacher, and with the LoRA adapter it is the student. Every request names its `Policy`,
so an engine has no current policy that could be stale. Where policies are whole weights (model.tuning full), requests are grouped
by policy, and the engine loads the weights of one group after the other (reload.py); the base is a policy like the others.

On CPU in fp32 a seeded trace depends on its prompt, seed and policy only, and not on the other rows of its batch. GPU kernels
choose their tiling by batch size, so there a near-tie between two tokens may fall the other way.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actors.inference import adapters, phase, self_check, startup, vllm_scoring, vllm_sleep
from actors.inference.reload import Reloader
from actors.inference.reload import fetch as fetch_whole
from actors.inference.stepping import Request, Stepper
from actors.inference.vllm_scoring import sampling_params
from pipeline import config
from pipeline.contract import EngineFacts, Failure, Generate, Generation, Policy, Sampling, Score, Sequence
from pipeline.errors import EngineError
from pipeline.fit.machine import Line
from pipeline.method.bounds import bounds
from pipeline.models.resolve import local_folder, resolve_model
from pipeline.stages.chat import splice
from pipeline.stages.score import bounds_instead
from pipeline.stages.signals import broken

if TYPE_CHECKING:
    from vllm import SamplingParams

log = logging.getLogger(__name__)


class Engine:
    """A vLLM engine in this process.

    The constructor starts vLLM, or shares `vllm`, which another engine of the same model started. It raises ModelError for a
    wrong path or window, and EngineError when vLLM cannot start.
    """

    takes_adapters = True

    def __init__(self, model: config.Model, pool: config.Pool, score: config.ScoreSettings, vllm: Stepper | None = None) -> None:
        self._model, self._pool, self._score, self._keep = model, pool, score, score.keep_topk
        self._path = resolve_model(model.path)
        if vllm is None:
            startup.set_environment(pool, score.entropy == "exact")
        self._stop_ids, self._hidden_size = startup.inspect_model(model)
        self._adapters: dict[tuple[int, str, str], Any] = {}  # by policy version, folder and hash of the content
        self._adapters_lock = threading.Lock()
        self._asleep = False
        self._shares = True  # whether traces share their prompts
        reload = Reloader(local_folder(model), model.dtype) if model.tuning == "full" else None
        self.vllm = vllm or Stepper(self._start, self._path, pool, reload)
        try:
            score.check_vocabulary(self.vllm.facts.vocab_size)
            self._facts = self._choose_entropy()
            # A token has its log-prob, the best log-probs, and its entropy or a column that a faulty hook may write.
            self._best = 0 if self._facts.entropy_method == "exact" else min(score.top_k, self._facts.vocab_size - 1)
            self._check_topk()
        except BaseException:
            if vllm is None:
                self.close()
            raise

    @property
    def steps(self) -> int:
        """Steps of vLLM so far. An engine with work whose steps do not move is stuck."""
        return self.vllm.steps

    def facts(self) -> EngineFacts:
        """What this engine's numbers mean. The self-check at the start has decided `entropy_method`."""
        return self._facts

    def generate(self, requests: list[Generate], policy: Policy, sampling: Sampling) -> list[Generation | Failure]:
        """One trace per request, in order. Log-probs and entropies are those at temperature 1, whatever `sampling` says.

        A prompt that leaves no room in the window becomes a Failure. Raises ModelError for an adapter that does not fit, and
        EngineError when the engine broke.
        """
        window = self._model.max_model_len
        lora = self._lora(policy)
        prepared: list[Request | Failure] = []
        for request in requests:
            room = window - len(request.prompt)
            problem = _misfit(request.prompt, self._facts.vocab_size)
            if room < 1:
                problem = f"prompt of {len(request.prompt)} tokens leaves no room in model.max_model_len {window}"
            prepared.append(Failure(problem) if problem else (request.prompt, self._sampling(request, sampling, room)))
        return [
            answer if isinstance(answer, Failure) else self._generation(answer, policy) for answer in self._submit(prepared, lora)
        ]

    def score(self, sequences: list[Sequence], policy: Policy) -> list[Score | Failure]:
        """Log-prob and entropy of every response token under `policy`, at temperature 1, in nats, and score.keep_topk tokens.

        `Score.tokens` holds the ids that the engine scored. A sequence that exceeds the window, or has an empty response,
        becomes a Failure. Raises as `generate` does.
        """
        lora = self._lora(policy)
        window = self._model.max_model_len
        prepared: list[Request | Failure] = []
        for sequence in sequences:
            ids = splice(sequence.prompt, sequence.response)
            problem = _misfit(sequence.prompt, self._facts.vocab_size) or _misfit(ids, self._facts.vocab_size)
            if not sequence.response:
                problem = "empty response"
            elif len(ids) > window:
                problem = f"prompt and response of {len(ids)} tokens exceed model.max_model_len {window}"
            way = self._facts.scoring
            asked = (sequence.prompt, sequence.response, way, max(self._best, self._keep) + 1, self._keep)
            prepared.append(Failure(problem) if problem else vllm_scoring.request(*asked))
        answers = self._submit(prepared, lora)
        return [
            answer if isinstance(answer, Failure) else self._scored(answer, len(sequence.response))
            for answer, sequence in zip(answers, sequences, strict=True)
        ]

    def sleep(self) -> bool:
        """Free the GPU memory of weights and cache until `wake`. Meanwhile requests raise EngineError. No request may be in it.

        False, with nothing changed, where vLLM cannot sleep: on a CPU, or without `colocate`.
        """
        self._asleep = True
        self._asleep = self.vllm.alone(vllm_sleep.sleep)
        return self._asleep

    def wake(self) -> None:
        """Take the GPU memory again. Raises EngineError, with the arithmetic, when it is not free."""
        try:
            self.vllm.alone(vllm_sleep.wake)
        except Exception as error:
            raise startup.start_error(error, self._path, self._pool, "wake up") from error
        self._asleep = False

    def close(self) -> None:
        """Stop the engine and free its memory. Calls that still wait raise EngineError."""
        self.vllm.close()

    def _start(self) -> tuple[Any, EngineFacts]:
        """Start vLLM. Returns it, and what its numbers mean."""
        try:
            lora = self.takes_adapters and self._model.tuning == "lora"
            engine = startup.start_vllm(self._model, self._pool, self._path, lora)
        except Exception as error:
            raise startup.start_error(error, self._path, self._pool) from error
        return engine, startup.facts(engine, self._model)

    # ---- requests and answers --------------------------------------------------------------------------------------

    def _submit(self, prepared: list[Request | Failure], lora: Any, shares: str = "") -> list[Any]:
        """A RequestOutput of vLLM or a Failure for each row of `prepared`, in order. Rows that are Failures stay as they are.

        Rows share the keys and values of the prompts that they have in common, also with calls of the same `shares`.
        """
        if not self._shares:
            for row in prepared:
                if not isinstance(row, Failure):
                    row[1].skip_reading_prefix_cache = True
        if self._asleep:
            raise EngineError("the engine sleeps", self._path, "Wake it first")
        requests = [row for row in prepared if not isinstance(row, Failure)]
        answers = iter(self.vllm.submit(requests, lora, shares) if requests else ())
        return [row if isinstance(row, Failure) else next(answers) for row in prepared]

    def _sampling(self, request: Generate, sampling: Sampling, room: int) -> SamplingParams:
        """vLLM's parameters for one trace of at most `room` tokens."""
        return sampling_params(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=min(sampling.max_new_tokens, room),
            seed=request.seed,
            logprobs=self._best + 1,
            stop_token_ids=self._stop_ids,
            skip_reading_prefix_cache=False,
        )

    def _generation(self, answer: Any, policy: Policy) -> Generation:
        completion = answer.outputs[0]
        tokens = np.asarray(completion.token_ids, dtype=np.int32)
        table = np.asarray(completion.logprobs.logprobs, dtype=np.float32).reshape(len(tokens), self._best + 2)
        logprobs, entropy, error = self._evidence(table)
        return Generation(tokens, logprobs, entropy, error, completion.finish_reason, policy.version)

    def _scored(self, answer: Any, num_tokens: int) -> Score | Failure:
        """The score of the last `num_tokens` tokens of a sequence, from vLLM's answer."""
        found = vllm_scoring.read(answer, num_tokens, self._keep)
        if found is None:
            return Failure("vLLM gave no log-probs")
        kept = (found.kept, found.table[:, 1 : 1 + self._keep].copy()) if self._keep else ()
        return Score(found.tokens, *self._evidence(found.table), *kept)

    def _evidence(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """(log-probs [T], entropies [T], half-width) float32 nats, from vLLM's numbers float32 [T, k]: token, best, entropy.

        Entropies are exact, or midpoints of bounds. The half-width is the largest distance of a midpoint to its bounds.
        """
        if self._facts.entropy_method == "exact":
            return table[:, 0].copy(), np.maximum(table[:, -1], 0.0), 0.0

        lower, upper = bounds(table[:, 1 : 1 + self._best], self._facts.vocab_size)
        return table[:, 0].copy(), ((lower + upper) / 2).astype(np.float32), float(((upper - lower) / 2).max(initial=0.0))

    def _lora(self, policy: Policy) -> Any:
        """vLLM's LoRARequest for the adapter of `policy`, or its whole weights; None for the base model.

        An adapter is checked once, before vLLM loads it. A folder whose files changed gets a new LoRARequest.
        """
        if policy.adapter is None:
            return None
        with self._adapters_lock:
            if self._model.tuning == "full":
                return fetch_whole(policy.version, policy.adapter, self._hidden_size)
            folder, content = adapters.fetch(policy.adapter)
            key = (policy.version, folder, content)
            if key not in self._adapters:
                from vllm.lora.request import LoRARequest

                adapters.check(folder, policy.adapter, self._model, self._hidden_size)
                number = len(self._adapters) + 1
                self._adapters[key] = LoRARequest(f"policy-{policy.version}-{number}", number, folder)
            return self._adapters[key]

    def _choose_entropy(self) -> EngineFacts:
        """The facts with the self-check's verdict, or with bounds where the settings ask for them.

        Raises EngineError when the check fails and `score.fallback` is off.
        """
        if self._score.entropy == "bounds":
            return replace(self.vllm.facts, entropy_method="bounds", scoring="prompt")
        phase.enter(phase.CHECKS)
        try:
            facts = self._check_itself()
        except EngineError as error:
            self._shares = False
            facts = self._check_itself()
            log.warning("traces do not share their prompts, since this engine computes a shared one wrong: %s", error.what)
        if facts.fallback and not self._score.fallback:
            what = f"exact entropies are not available from {facts.engine} ({facts.fallback})"
            remedy = "Install a vLLM in the supported window, or let bounds take their place: score.fallback=true"
            raise EngineError(what, self._path, remedy)
        if facts.fallback:
            log.warning("%s", bounds_instead(facts.fallback))
        return facts

    def _check_itself(self) -> EngineFacts:
        """The verdict of the self-check. Its requests share their prompts with each other, unless the engine shares none."""
        salt = f"check {id(self)}"
        return self_check.settle(lambda request: self._submit([request], None, salt)[0], self.vllm.facts, self._keep)

    def _check_topk(self) -> None:
        """Raise EngineError when vLLM does not give the tokens that score.keep_topk asks for, for example since it caps them."""
        if not self._keep:
            return
        facts = self._facts
        [answer] = self.score([Sequence([facts.vocab_size // 2], [facts.vocab_size // 3])], Policy(0))
        fault = answer if isinstance(answer, Failure) else broken(answer, facts.vocab_size)
        if fault is not None:
            cause = fault.cause if isinstance(fault, Failure) else fault[1]
            what = f"{facts.engine} does not give the {self._keep} most likely tokens of a position ({cause})"
            raise EngineError(what, "score.keep_topk", "Lower it, or raise what the engine allows")


def judge_entropy(run: config.Run, num_gpus: int) -> Line:
    """Start an engine on this machine and tell which entropies its self-check allowed, for `egrsd doctor`.

    The engine has the run's model when that is a local folder and the GPUs suffice, and otherwise the tiny model that ships.
    Raises ModelError or EngineError when the engine does not start.
    """
    pool, model = run.engines.rollout, run.model
    if not Path(resolve_model(model.path)).is_dir() or pool.placement.gpus > num_gpus:
        model, pool = config.Model(), config.Pool(threads=1, kv_cache_gib=0.25)
    engine = Engine(model, pool, config.ScoreSettings())
    facts = engine.facts()
    engine.close()
    text = f"{facts.entropy_method}, by the self-check of {facts.engine} with {model.path}"
    if facts.entropy_method == "exact":
        return Line("ok", "exact entropy", text)
    level: Literal["warning", "error"] = "warning" if run.score.fallback else "error"
    return Line(level, "exact entropy", f"{text}: {facts.fallback}. Install a vLLM in the supported window for exact entropies")


def _misfit(ids: list[int], vocab_size: int) -> str:
    """Why the engine cannot take these token ids; "" when it can."""
    if not ids:
        return "empty prompt"
    stray = next((end for end in (min(ids), max(ids)) if not 0 <= end < vocab_size), None)
    return "" if stray is None else f"token id {stray} is outside the vocabulary of {vocab_size}"
