"""One vLLM engine as a plain class: writes traces and scores responses, with log-prob and exact entropy of every token.

`generate` and `score` block, and may be called from many threads at once: one thread owns vLLM, takes requests in as they
come and steps them together, so traces of different callers share batches (continuous batching).

The base model alone is the teacher; base and LoRA adapter are the student. Each request says which (`Policy`), so an engine
never has a current policy that could be stale. A seeded trace depends on its prompt, seed and policy only, not on what shares
its batch (fp32, CPU; on GPUs kernels that choose their tiling by batch size may turn a near-tie).
"""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actors import adapters, startup
from pipeline import config
from pipeline.contract import EngineFacts, Failure, Generate, Generation, Policy, Sampling, Score, Sequence
from pipeline.errors import EngineError, ModelError, first_line
from pipeline.models.resolve import resolve_model
from pipeline.stages.chat import splice

if TYPE_CHECKING:
    from vllm import SamplingParams

log = logging.getLogger(__name__)

_CHECK_TOKENS = 8
# Largest |entropy - entropy of the full distribution| that the self-check lets pass, nats. In half precision the log-probs that
# the two requests return come from forwards whose batches differ.
_CHECK_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}


@dataclass
class _Batch:
    """What one caller waits for: `rows` filled in as its requests end, the future once all have."""

    requests: list[tuple[list[int], SamplingParams]]
    lora: Any
    rows: list[Any] = field(default_factory=list)
    pending: int = 0
    done: Future[list[Any]] = field(default_factory=Future)


class Engine:
    """A vLLM engine in this process. Raises ModelError (path, window, adapter settings) or EngineError when it cannot start."""

    def __init__(self, model: config.Model, pool: config.Pool, score: config.ScoreSettings) -> None:
        self._model, self._pool, self._score = model, pool, score
        self._path = resolve_model(model.path)
        startup.set_environment(pool, score.entropy == "exact")
        self._stop_ids, self._hidden_size = startup.inspect_model(model, self._path)
        self._inbox: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._broken: BaseException | None = None
        self._gate = threading.Lock()  # nothing enters the inbox of a broken engine
        self._adapters: dict[tuple[int, str, str], Any] = {}  # by policy version, folder and hash of the content
        self._adapters_lock = threading.Lock()
        self._columns = 1
        started: Future[EngineFacts] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="vllm", daemon=True)
        self._thread.start()
        self._facts = started.result()
        try:
            self._choose_entropy()
        except BaseException:
            self.close()
            raise

    def facts(self) -> EngineFacts:
        """What this engine's numbers mean; entropy_method is what the self-check at start allowed."""
        return self._facts

    def generate(self, requests: list[Generate], policy: Policy, sampling: Sampling) -> list[Generation | Failure]:
        """One trace per request, in order. Log-probs and entropies are raw, at temperature 1, whatever `sampling` says.

        A prompt that leaves no room in the window is a Failure. Raises ModelError for an adapter that does not fit and
        EngineError when the engine itself broke.
        """
        window = self._model.max_model_len
        lora = self._lora(policy)
        prepared: list[tuple[list[int], SamplingParams] | Failure] = []
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
        """Log-prob and entropy of every response token under `policy`, at temperature 1; tokens are those the engine saw.

        A sequence longer than the window, or with an empty response, is a Failure. Raises as `generate` does.
        """
        from vllm import SamplingParams

        lora = self._lora(policy)
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=self._columns, **final_only())
        window = self._model.max_model_len
        prepared: list[tuple[list[int], SamplingParams] | Failure] = []
        for sequence in sequences:
            ids = splice(sequence.prompt, sequence.response)
            problem = _misfit(sequence.prompt, self._facts.vocab_size) or _misfit(ids, self._facts.vocab_size)
            if not sequence.response:
                problem = "empty response"
            elif len(ids) > window:
                problem = f"prompt and response of {len(ids)} tokens exceed model.max_model_len {window}"
            prepared.append(Failure(problem) if problem else (ids, params))
        answers = self._submit(prepared, lora)
        return [
            answer if isinstance(answer, Failure) else self._scored(answer, len(sequence.response))
            for answer, sequence in zip(answers, sequences, strict=True)
        ]

    def close(self) -> None:
        """Stop the engine and free its memory; callers that still wait get EngineError."""
        self._inbox.put(None)
        self._thread.join(timeout=60)

    # ---- requests and answers --------------------------------------------------------------------------------------

    def _submit(self, prepared: list[tuple[list[int], SamplingParams] | Failure], lora: Any) -> list[Any]:
        """Answers of vLLM (RequestOutput, or Failure) in the order of `prepared`; what failed already stays as it is."""
        batch = _Batch([row for row in prepared if not isinstance(row, Failure)], lora)
        if not batch.requests:
            return list(prepared)
        with self._gate:
            if self._broken is not None:
                raise EngineError(f"the engine broke: {first_line(self._broken)}", self._path, "Start it again")
            self._inbox.put(batch)
        answers = iter(batch.done.result())
        return [row if isinstance(row, Failure) else next(answers) for row in prepared]

    def _sampling(self, request: Generate, sampling: Sampling, room: int) -> SamplingParams:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=min(sampling.max_new_tokens, room),
            seed=request.seed,
            logprobs=self._columns,
            stop_token_ids=self._stop_ids,
            **final_only(),
        )

    def _generation(self, answer: Any, policy: Policy) -> Generation:
        completion = answer.outputs[0]
        tokens = np.asarray(completion.token_ids, dtype=np.int32)
        logprobs, entropy, error = self._evidence(completion.logprobs.logprobs, len(tokens))
        return Generation(tokens, logprobs, entropy, error, completion.finish_reason, policy.version)

    def _scored(self, answer: Any, num_tokens: int) -> Score:
        width = self._columns + 1
        flat = answer.prompt_logprobs
        tokens = np.asarray(flat.token_ids[-num_tokens * width :: width], dtype=np.int32)
        return Score(tokens, *self._evidence(flat.logprobs[-num_tokens * width :], num_tokens))

    def _evidence(self, flat: list[float], num_tokens: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Log-probs [T], entropies [T] float32 nats and the entropies' largest half-width, from vLLM's flat [T * (k + 1)]."""
        table = np.asarray(flat, dtype=np.float32).reshape(num_tokens, self._columns + 1)
        if self._facts.entropy_method == "exact":
            return table[:, 0].copy(), np.maximum(table[:, 1], 0.0), 0.0
        from pipeline.method.entropy import bounds

        lower, upper = bounds(table[:, 1:-1], self._facts.vocab_size)  # a faulty hook may have written the last column
        return table[:, 0].copy(), ((lower + upper) / 2).astype(np.float32), float(((upper - lower) / 2).max(initial=0.0))

    def _lora(self, policy: Policy) -> Any:
        """vLLM's name for the adapter of `policy` (None: base). Checked once, before vLLM sees it; new when its files are."""
        if policy.adapter is None:
            return None
        with self._adapters_lock:
            folder, content = adapters.fetch(policy.adapter)
            key = (policy.version, folder, content)
            if key not in self._adapters:
                from vllm.lora.request import LoRARequest

                adapters.check(folder, policy.adapter, self._model, self._hidden_size)
                number = len(self._adapters) + 1
                self._adapters[key] = LoRARequest(f"policy-{policy.version}-{number}", number, folder)
            return self._adapters[key]

    # ---- the thread that owns vLLM ---------------------------------------------------------------------------------

    def _run(self, started: Future[EngineFacts]) -> None:
        try:
            engine = startup.start_vllm(self._model, self._pool, self._path)
            started.set_result(startup.facts(engine, self._model))
        except BaseException as error:  # the constructor waits for it and raises it
            started.set_exception(startup.start_error(error, self._path))
            return
        waiting: dict[str, tuple[_Batch, int]] = {}
        try:
            while self._take_in(engine, waiting):
                for output in engine.step():
                    _deliver(waiting, output.request_id, output)
            broken: BaseException = EngineError("the engine was closed", self._path)
        except Exception as error:  # whatever vLLM raises in a step, its callers must hear it
            log.exception("vLLM broke")
            broken = error
        self._fail_all(waiting, broken)
        engine.engine_core.shutdown()

    def _take_in(self, engine: Any, waiting: dict[str, tuple[_Batch, int]]) -> bool:
        """Hand new batches to vLLM; sleep when there is nothing to step. False: close."""
        while True:
            try:
                batch = self._inbox.get(block=not waiting)
            except queue.Empty:
                return True
            if batch is None:
                return False
            _admit(engine, batch, waiting)

    def _fail_all(self, waiting: dict[str, tuple[_Batch, int]], broken: BaseException) -> None:
        with self._gate:
            self._broken = broken
        batches = {id(batch): batch for batch, _ in waiting.values()}
        while not self._inbox.empty():
            batch = self._inbox.get()
            if batch is not None:
                batches[id(batch)] = batch
        for batch in batches.values():
            batch.done.set_exception(EngineError(f"the engine broke: {first_line(broken)}", self._path))

    # ---- self-check ------------------------------------------------------------------------------------------------

    def _choose_entropy(self) -> None:
        """Exact entropies if asked for and proven on this engine; otherwise bounds, aloud."""
        wrong = self._entropy_error() if self._score.entropy == "exact" else ""
        if wrong:
            log.warning(
                "Exact entropy is not available from this vLLM (%s): using the bounds of the %d best tokens. "
                "Stored entropies are midpoints, with entropy_method 'bounds' and their half-width in entropy_error.",
                wrong,
                self._score.top_k,
            )
        if wrong or self._score.entropy == "bounds":
            self._columns = min(self._score.top_k + 1, self._facts.vocab_size)
            self._facts = EngineFacts(**{**vars(self._facts), "entropy_method": "bounds"})

    def _entropy_error(self) -> str:
        """What is wrong with the hook's entropies, "" if nothing: generation and scoring against the full distribution."""
        from vllm import SamplingParams

        vocab = self._facts.vocab_size
        prompt = [3 % vocab, 5 % vocab, 7 % vocab]
        num_tokens = min(_CHECK_TOKENS, self._model.max_model_len - len(prompt))
        greedy = SamplingParams(max_tokens=num_tokens, temperature=0.0, logprobs=1, ignore_eos=True, **final_only())
        [written] = self._submit([(prompt, greedy)], None)
        if isinstance(written, Failure):
            return written.cause
        ids = list(written.outputs[0].token_ids)
        full = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=vocab, **final_only())
        one = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, **final_only())
        scored, whole = self._submit([(prompt + ids, one), (prompt + ids, full)], None)
        if isinstance(scored, Failure) or isinstance(whole, Failure):
            return f"{scored if isinstance(scored, Failure) else whole}"
        table = np.asarray(whole.prompt_logprobs.logprobs, np.float64).reshape(-1, vocab + 1)[-num_tokens:]
        expected = full_entropy(table[:, 1:-1])
        return _difference("generation", written.outputs[0].logprobs.logprobs, expected, self._model.dtype) or _difference(
            "scoring", scored.prompt_logprobs.logprobs[-2 * num_tokens :], expected, self._model.dtype
        )


def full_entropy(most: np.ndarray) -> np.ndarray:
    """Entropy [N] nats of distributions given by the log-probs [N, V-1] of all tokens but the least likely one."""
    p = np.exp(most)
    last = np.clip(1 - p.sum(1), 0, 1)
    return -(p * most).sum(1) - last * np.log(last, out=np.zeros_like(last), where=last > 0)


def _difference(what: str, flat: list[float], expected: np.ndarray, dtype: str) -> str:
    got = np.asarray(flat, np.float64).reshape(-1, 2)[:, 1]
    gap = float(np.abs(got - expected).max())
    return "" if gap <= _CHECK_TOLERANCE[dtype] else f"{what} differs from the full distribution by {gap:.2g} nat"


def _admit(engine: Any, batch: _Batch, waiting: dict[str, tuple[_Batch, int]]) -> None:
    batch.rows = [None] * len(batch.requests)
    batch.pending = len(batch.requests)
    try:
        if batch.lora is not None:  # loaded here, where a bad one fails its own batch and not the engine's step
            engine.add_lora(batch.lora)
    except (ValueError, RuntimeError, OSError) as error:
        problem = f"vLLM cannot load the adapter ({first_line(error)})"
        batch.done.set_exception(ModelError(problem, batch.lora.lora_path))
        return
    for row, (ids, params) in enumerate(batch.requests):
        name = f"{id(batch)}-{row}"
        waiting[name] = (batch, row)
        try:
            engine.add_request(name, {"prompt_token_ids": ids}, params, lora_request=batch.lora)
        except ValueError as error:  # vLLM's own validation: this request only
            _deliver(waiting, name, Failure(first_line(error)))


def _deliver(waiting: dict[str, tuple[_Batch, int]], name: str, answer: Any) -> None:
    batch, row = waiting.pop(name)
    batch.rows[row] = answer
    batch.pending -= 1
    if batch.pending == 0:
        batch.done.set_result(batch.rows)


def final_only() -> dict[str, Any]:
    """SamplingParams arguments that every request shares: one answer, at its end, as flat arrays and without text."""
    from vllm.sampling_params import RequestOutputKind

    return {"flat_logprobs": True, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}


def _misfit(ids: list[int], vocab_size: int) -> str:
    if not ids:
        return "empty prompt"
    stray = next((end for end in (min(ids), max(ids)) if not 0 <= end < vocab_size), None)
    return "" if stray is None else f"token id {stray} is outside the vocabulary of {vocab_size}"
