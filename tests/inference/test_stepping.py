"""The thread that owns vLLM, over a vLLM of a few lines: who gets which answer, and what becomes of callers when it breaks."""

import errno
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from vllm.exceptions import VLLMValidationError
from waiting import until

from actors.inference.reload import Whole
from actors.inference.stepping import Stepper
from pipeline import config
from pipeline.contract import EngineFacts, Failure
from pipeline.errors import EngineError, ModelError
from pipeline.training.student.whole import Probe

FACTS = EngineFacts("exact", "raw_logprobs", "float32", "vllm of a test", 256, 57)


class Echo:
    """A vLLM that answers a request with its ids, the newest request first, a request per step."""

    def __init__(self, breaks=False):
        self.requests, self.breaks, self.ended = [], breaks, threading.Event()
        executor = SimpleNamespace(is_failed=False)
        self.engine_core = SimpleNamespace(shutdown=self.ended.set, engine_core=SimpleNamespace(model_executor=executor))

    def add_request(self, name, prompt, params, lora_request):
        if params == "refused":
            raise ValueError("no such parameter\nTraceback")
        if params == "capped":
            raise VLLMValidationError("Requested prompt logprobs of 31, which is greater than max allowed: 20")
        self.requests.append((name, prompt["prompt_token_ids"]))

    def add_lora(self, lora):
        if isinstance(lora.lora_path, Exception):
            raise lora.lora_path
        if lora.lora_path == "bad":
            raise RuntimeError("torn")
        if lora.lora_path == "never seen":
            raise KeyError("no slot")

    def step(self):
        if self.breaks:
            raise RuntimeError("the device is gone")
        name, ids = self.requests.pop()
        return [SimpleNamespace(request_id=name, ids=ids)]


@pytest.fixture
def started():
    """Starts steppers, and closes them."""
    steppers = []

    def start(vllm, reload=None):
        steppers.append(Stepper(lambda: (vllm, FACTS), "some/model", reload=reload))
        return steppers[-1]

    yield start
    for stepper in steppers:
        stepper.close()


def ids(answers):
    return [getattr(answer, "ids", answer) for answer in answers]


def test_callers_get_their_own_answers_in_order(started):
    stepper, answers = started(Echo()), {}
    assert stepper.facts == FACTS

    def ask(first):
        answers[first] = ids(stepper.submit([([first + row], None) for row in range(20)], None))

    threads = [threading.Thread(target=ask, args=(first,)) for first in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert answers == {first: [[first + row] for row in range(20)] for first in (0, 100, 200)}


def test_what_vllm_refuses_fails_alone(started):
    stepper = started(Echo())
    assert ids(stepper.submit([([1], None), ([2], "refused"), ([3], None)], None)) == [[1], Failure("no such parameter"), [3]]
    assert ids(stepper.submit([([2], "refused")], None)) == [Failure("no such parameter")]
    capped = stepper.submit([([2], "capped"), ([3], None)], None)
    assert capped[0].cause.startswith("Requested prompt logprobs of 31, which is greater than max allowed: 20")
    assert ids(capped[1:]) == [[3]]
    with pytest.raises(ModelError, match=r"bad: vLLM cannot load the adapter \(RuntimeError: torn\)"):
        stepper.submit([([1], None)], SimpleNamespace(lora_path="bad"))
    assert ids(stepper.submit([([4], None)], SimpleNamespace(lora_path="good"))) == [[4]]


def test_a_broken_engine_says_so_to_everyone(started):
    """A step that fails ends the callers that wait and those that come, not with silence."""
    vllm = Echo(breaks=True)
    stepper = started(vllm)
    for _ in range(2):
        with pytest.raises(EngineError, match="some/model: the engine broke: RuntimeError: the device is gone"):
            stepper.submit([([1], None)], None)
    assert vllm.ended.wait(300)


@pytest.mark.parametrize("path", ["bad", "never seen"])
def test_an_adapter_that_cannot_be_loaded_because_vllm_broke_is_no_mistake_of_the_user(started, path):
    """A process of a tensor-parallel vLLM has died, or vLLM raised what no adapter makes it raise."""
    vllm = Echo()
    vllm.engine_core.engine_core.model_executor.is_failed = path == "bad"
    stepper = started(vllm)
    for _ in range(2):
        with pytest.raises(EngineError, match="some/model: the engine broke"):
            stepper.submit([([1], None)], SimpleNamespace(lora_path=path))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
        RuntimeError("Worker failed with error 'CUDA error: uncorrectable ECC error encountered'"),
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EIO, "Input/output error"),
    ],
)
def test_a_card_or_a_disk_that_fails_while_an_adapter_is_loaded_is_no_mistake_of_the_user(started, error):
    """It ended the run, and another engine could have loaded the adapter."""
    stepper = started(Echo())
    with pytest.raises(EngineError, match="some/model: the engine broke: .*" + re.escape(str(error))):
        stepper.submit([([1], None)], SimpleNamespace(lora_path=error))


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file"), OSError("no file named adapter_config.json")])
def test_an_adapter_that_is_not_there_is_refused_and_the_engine_goes_on(started, error):
    stepper = started(Echo())
    with pytest.raises(ModelError, match="vLLM cannot load the adapter"):
        stepper.submit([([1], None)], SimpleNamespace(lora_path=error))
    assert ids(stepper.submit([([4], None)], None)) == [[4]]


def test_a_closed_engine_says_so_and_frees_vllm(started):
    vllm = Echo()
    stepper = started(vllm)
    stepper.close()
    assert vllm.ended.is_set()
    with pytest.raises(EngineError, match="the engine was closed"):
        stepper.submit([([1], None)], None)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("no such device"), EngineError, "some/model: vLLM did not start .ValueError: no such device"),
        (ModelError("no model here", "elsewhere"), ModelError, "elsewhere: no model here"),
    ],
)
def test_an_error_at_the_start_is_raised_by_the_constructor(error, kind, message):
    def start():
        raise error

    with pytest.raises(kind, match=message):
        Stepper(start, "some/model")


def test_a_step_without_memory_names_what_to_lower():
    class Full(Echo):
        def step(self):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    card = config.Pool(placement=config.Placement(gpus=1))
    for pool, remedy in ((card, "Lower memory_share"), (config.Pool(), r"Set these engines' kv_cache_gib \(")):
        stepper = Stepper(lambda: (Full(), FACTS), "path", pool)
        with pytest.raises(EngineError, match=rf"path: the engine broke: RuntimeError: CUDA out of memory.* {remedy}"):
            stepper.submit([([5], None)], None)


def test_work_on_vllm_itself_is_done_alone_and_its_error_is_its_callers():
    stepper = Stepper(lambda: (Echo(), FACTS), "path")
    assert stepper.alone(lambda engine: engine.requests) == []
    with pytest.raises(ZeroDivisionError):
        stepper.alone(lambda engine: 1 / 0)
    [answer] = stepper.submit([([5, 6], None)], None)
    assert answer.ids == [5, 6]

    class Busy(Echo):
        def step(self):
            entered.set()
            go.wait(300)
            return super().step()

    entered, go = threading.Event(), threading.Event()
    busy = Stepper(lambda: (Busy(), FACTS), "path")
    told = []
    asking = threading.Thread(target=lambda: told.append(busy.submit([([5], None), ([6], None)], None)))
    asking.start()
    assert entered.wait(300)
    threading.Timer(0.2, go.set).start()
    with pytest.raises(EngineError, match="the engine holds requests"):
        busy.alone(lambda engine: None)
    asking.join(300)
    assert len(told[0]) == 2
    for one in (stepper, busy):
        one.close()
    with pytest.raises(EngineError, match="was closed"):
        stepper.alone(lambda engine: None)


def weights(version):
    return Whole(version, f"policy/{version}", str(version), Probe(tokens=(1, 2), logprobs=(-1.0,), base_logprobs=(-2.0,)))


def test_each_request_is_answered_under_its_own_weights_and_requests_are_grouped(started):
    vllm, loads = Echo(), []

    def reload(engine, wanted, loaded):
        assert engine is vllm
        assert not vllm.requests, "no request may be in vLLM while its weights change"
        assert loaded == (loads[-1] if loads else None)
        loads.append(wanted)

    plain_step = vllm.step

    def step():
        [answer] = plain_step()
        answer.ids = (answer.ids[0], loads[-1].version if loads and loads[-1] else 0)
        return [answer]

    vllm.step = step
    stepper, answers = started(vllm, reload), {}

    def ask(number):
        wanted = weights(number % 3) if number % 3 else None
        answers[number] = ids(stepper.submit([([number], None)] * 3, wanted))

    go = threading.Event()
    threads = [threading.Thread(target=stepper.alone, args=(lambda _: go.wait(300),))]
    threads += [threading.Thread(target=ask, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    until(lambda: stepper._inbox.qsize() == 30, what="all have asked")
    go.set()
    for thread in threads:
        thread.join(300)
    assert answers == {number: [(number, number % 3)] * 3 for number in range(30)}
    assert [wanted.version for wanted in loads] in ([1, 2], [2, 1])


@pytest.mark.parametrize("kind", [EngineError, ModelError])
def test_weights_that_cannot_be_loaded_reach_every_caller_that_waits(started, kind):
    """A ModelError stays one: with an EngineError the pool started hundreds of engines that failed alike."""

    def reload(*_):
        raise kind("policy 1 was loaded and does not answer", "policy/1")

    stepper = started(Echo(), reload)
    assert ids(stepper.submit([([4], None)], None)) == [[4]]
    with pytest.raises(kind, match="policy 1 was loaded and does not answer"):
        stepper.submit([([5], None)], weights(1))
    with pytest.raises(kind, match="the engine broke" if kind is EngineError else "does not answer"):
        stepper.submit([([6], None)], None)
