"""The thread that owns one vLLM: it takes batches in as they come, steps them together, and hands each its answers.

When vLLM breaks or is closed, every batch in it or on its way gets its error, and no other batch is let in.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from actors.inference.reload import Reload, Whole
from actors.inference.startup import memory_remedy, start_error
from pipeline import config
from pipeline.contract import EngineFacts, Failure
from pipeline.errors import EgrsdError, EngineError, ModelError, first_line, whole_cause

if TYPE_CHECKING:
    from vllm import SamplingParams

log = logging.getLogger(__name__)

_CARD = ("out of memory", "cuda error", "nccl error")  # in what torch says of a card; a process of vLLM hands on the words alone
_OF_PATHS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)  # a wrong path, and no broken disk
_LINGER_S = 0.1  # vLLM waits so long for more work under its weights, before it takes the weights that other work waits for

Request = tuple[list[int], "SamplingParams"]


@dataclass(eq=False)
class _Batch:
    """The requests of one call. `rows` gets each answer as its request ends, and `done` gets them all at the end.

    lora: vLLM's LoRARequest, or None. salt: requests of one salt share what they have in common in vLLM's prefix cache.
    weights: the whole weights that must answer; None for the base.
    """

    requests: list[Request]
    lora: Any
    salt: str
    weights: Whole | None = None
    rows: list[Any] = field(default_factory=list)
    pending: int = 0
    done: Future[list[Any]] = field(default_factory=Future)


@dataclass
class _Call:
    """Work on vLLM itself, which holds no request meanwhile. `done` gets its result."""

    work: Callable[[Any], Any]
    done: Future[Any] = field(default_factory=Future)


class Stepper:
    """A vLLM and its thread.

    `start` runs in that thread, and returns a vLLM with its facts. `reload` gives vLLM other whole weights. Batches of other
    weights than those loaded wait until vLLM has no work.
    For messages: the model's `path`, the `pool`. The constructor raises EngineError when `start` fails, or the EgrsdError that
    `start` raised.
    """

    def __init__(
        self,
        start: Callable[[], tuple[Any, EngineFacts]],
        path: str,
        pool: config.Pool | None = None,
        reload: Reload | None = None,
    ) -> None:
        self._path, self._pool, self._reload = path, pool, reload
        self._loaded: Whole | None = None
        self._held: deque[_Batch] = deque()  # batches that wait for other weights, the oldest first
        self._inbox: queue.SimpleQueue[_Batch | _Call | None] = queue.SimpleQueue()
        self._broken: BaseException | None = None
        self._salts = count()
        self.steps = 0  # steps of vLLM so far: they show that it is at work
        self._gate = threading.Lock()  # guards _broken: nothing may enter the inbox of a broken vLLM
        started: Future[EngineFacts] = Future()
        self._thread = threading.Thread(target=self._run, args=(start, started), name="vllm", daemon=True)
        self._thread.start()
        self.facts = started.result()

    def submit(self, requests: list[Request], lora: Any, shares: str = "") -> list[Any]:
        """A RequestOutput of vLLM for each request, in order, or a Failure where vLLM refuses the request. Blocks.

        `lora` is vLLM's LoRARequest, the whole weights that must answer, or None for the base model. Calls share the keys and
        values of their prompts only where they name the same `shares`: an answer must not depend on what vLLM did before.
        Raises ModelError when vLLM cannot load what is asked for, and EngineError when vLLM broke or was closed.
        """
        salt = shares or str(next(self._salts))
        weights = lora if isinstance(lora, Whole) else None
        return self._put(_Batch(requests, None if weights else lora, salt, weights)).result()

    def alone(self, work: Callable[[Any], Any]) -> Any:
        """The result of `work(vllm)` in vLLM's thread. Blocks, and raises what `work` raises.

        Raises EngineError when vLLM holds a request, broke or was closed.
        """
        return self._put(_Call(work)).result()

    def _put(self, item: _Batch | _Call) -> Future[Any]:
        """Hand an item to vLLM's thread, and return what it will give. Raises the error of a vLLM that broke or was closed."""
        with self._gate:
            if self._broken is not None:
                raise self._told(self._broken, "Start it again")
            self._inbox.put(item)
        return item.done

    def close(self) -> None:
        """Stop vLLM and free its memory. Calls that still wait raise EngineError."""
        self._inbox.put(None)
        self._thread.join(timeout=60)

    def _run(self, start: Callable[[], tuple[Any, EngineFacts]], started: Future[EngineFacts]) -> None:
        """Start vLLM, then step it until it is closed or breaks. Every caller that waits then gets its error."""
        try:
            engine, facts = start()
            started.set_result(facts)
        except BaseException as error:  # the constructor waits for it and raises it
            started.set_exception(start_error(error, self._path))
            return
        waiting: dict[str, tuple[_Batch, int]] = {}
        try:
            while self._take_in(engine, waiting):
                for output in engine.step():
                    _deliver(waiting, output.request_id, output)
                self.steps += 1
            broken: BaseException = EngineError("the engine was closed", self._path)
        except Exception as error:  # any error of a step must reach the callers that wait
            log.exception("vLLM broke")
            broken = error
        self._fail_all(waiting, broken)
        engine.engine_core.shutdown()

    def _take_in(self, engine: Any, waiting: dict[str, tuple[_Batch, int]]) -> bool:
        """Hand new batches to vLLM, and wait for one when vLLM has no request. False when the engine is to close."""
        while True:
            try:
                batch = self._inbox.get(block=not waiting, timeout=_LINGER_S if self._held and not waiting else None)
            except queue.Empty:
                if waiting or not self._held:
                    return True
                self._change(engine, waiting)
                continue
            if batch is None:
                return False
            if isinstance(batch, _Call):
                self._call(engine, batch, busy=bool(waiting or self._held))
                continue
            if batch.weights != self._loaded:
                self._held.append(batch)
                continue
            try:
                _admit(engine, batch, waiting)
            except BaseException:
                self._inbox.put(batch)  # whoever fails all batches finds it there
                raise

    def _change(self, engine: Any, waiting: dict[str, tuple[_Batch, int]]) -> None:
        """Load the weights that the oldest held batch waits for, and hand vLLM all batches of these weights."""
        assert self._reload is not None
        wanted = self._held[0].weights
        self._reload(engine, wanted, self._loaded)
        self._loaded = wanted
        for batch in [batch for batch in self._held if batch.weights == wanted]:
            _admit(engine, batch, waiting)
            self._held.remove(batch)

    def _call(self, engine: Any, call: _Call, busy: bool) -> None:
        """Do the work of a call, unless vLLM is busy with requests. An error of the work is its caller's."""
        try:
            if busy:
                raise EngineError("the engine holds requests", self._path, "Wait for their answers")
            call.done.set_result(call.work(engine))
        except Exception as error:
            call.done.set_exception(error)

    def _fail_all(self, waiting: dict[str, tuple[_Batch, int]], broken: BaseException) -> None:
        """Give EngineError to every batch in vLLM or in the inbox, and let no other batch in."""
        with self._gate:
            self._broken = broken
        batches: dict[int, _Batch | _Call] = {id(batch): batch for batch in (*(b for b, _ in waiting.values()), *self._held)}
        while not self._inbox.empty():
            batch = self._inbox.get()
            if batch is not None:
                batches[id(batch)] = batch
        for batch in batches.values():
            batch.done.set_exception(self._told(broken, memory_remedy(broken, self._pool)))

    def _told(self, broken: BaseException, remedy: str) -> EgrsdError:
        """What callers get from an engine that broke: EngineError, or the ModelError that every other engine would give too."""
        if isinstance(broken, ModelError):
            return broken
        return EngineError(f"the engine broke: {whole_cause(broken)}", self._path, remedy)


def _admit(engine: Any, batch: _Batch, waiting: dict[str, tuple[_Batch, int]]) -> None:
    """Hand the requests of a batch to vLLM. An adapter that vLLM cannot load fails the batch with ModelError.

    Any other error is vLLM's own, and is raised.
    """
    batch.rows = [None] * len(batch.requests)
    batch.pending = len(batch.requests)
    try:
        if batch.lora is not None:  # a bad adapter must fail here, since in a step it would break the engine
            engine.add_lora(batch.lora)
    except (ValueError, RuntimeError, OSError) as error:
        if _has_lost_a_process(engine) or _is_of_the_machine(error):
            raise
        problem = f"vLLM cannot load the adapter ({whole_cause(error)})"
        batch.done.set_exception(ModelError(problem, batch.lora.lora_path))
        return
    for row, (ids, params) in enumerate(batch.requests):
        name = f"{id(batch)}-{row}"
        waiting[name] = (batch, row)
        try:
            engine.add_request(name, {"prompt_token_ids": ids, "cache_salt": batch.salt}, params, lora_request=batch.lora)
        except Exception as error:
            if not _refuses(error):
                raise
            _deliver(waiting, name, Failure(first_line(error)))


def _refuses(error: Exception) -> bool:
    """Whether vLLM refuses one request with this error, so that the others go on. Its own errors for that are no ValueError."""
    return isinstance(error, ValueError) or any(kind.__name__ == "VLLMClientError" for kind in type(error).__mro__)


def _is_of_the_machine(error: Exception) -> bool:
    """Whether a card or a disk failed while vLLM loaded an adapter. Another engine may load the same one."""
    if isinstance(error, OSError):
        return error.errno is not None and not isinstance(error, _OF_PATHS)
    return any(words in str(error).lower() for words in _CARD)


def _has_lost_a_process(engine: Any) -> bool:
    """Whether one of the processes of a tensor-parallel vLLM has died. Then every call fails, also one that loads an adapter."""
    core = getattr(engine.engine_core, "engine_core", None)
    return bool(getattr(getattr(core, "model_executor", None), "is_failed", False))


def _deliver(waiting: dict[str, tuple[_Batch, int]], name: str, answer: Any) -> None:
    """Put an answer into its batch, and wake the caller when the batch is complete."""
    batch, row = waiting.pop(name)
    batch.rows[row] = answer
    batch.pending -= 1
    if batch.pending == 0:
        batch.done.set_result(batch.rows)
