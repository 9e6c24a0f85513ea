"""What the self-check says of kept tokens that are not the likeliest. test_engine.py has it with a real engine."""

from types import SimpleNamespace

import numpy as np
import pytest

from actors.inference import self_check
from actors.inference.vllm_scoring import Numbers
from pipeline.contract import EngineFacts, Failure
from pipeline.errors import EngineError

V, T, KEEP = 57, 4, 8
FACTS = EngineFacts("exact", "raw_logprobs", "float32", "vllm of a test", 256, V)


def answer():
    """A distribution at each position, all tokens of it but the last, and the answer for the likeliest tokens."""
    logits = np.random.default_rng(0).normal(0, 3, (T, V))
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    kept = np.argsort(-logprobs, axis=1)[:, :KEEP]
    table = np.column_stack((logprobs[:, 0], np.take_along_axis(logprobs, kept, 1), np.zeros(T)))
    ids = np.tile(np.arange(V - 1), (T, 1))
    return ids, logprobs[:, :-1], Numbers(np.zeros(T, np.int32), table, kept)


def said(change=lambda numbers: numbers):
    ids, logprobs, numbers = answer()
    return self_check._wrong_topk(ids, logprobs, change(numbers), FACTS)


def test_the_likeliest_tokens_pass():
    assert said() == ""
    assert said(lambda numbers: numbers._replace(kept=numbers.kept[:, :0])) == ""


def moved(numbers):
    """Each log-prob beside the id of its neighbour."""
    return numbers._replace(kept=np.roll(numbers.kept, 1, axis=1))


def without_the_best(numbers):
    """The second to the ninth likeliest in the place of the first eight, all with their own log-probs."""
    _, logprobs, _ = answer()
    kept = np.argsort(-logprobs, axis=1)[:, 1 : KEEP + 1]
    table = numbers.table.copy()
    table[:, 1 : KEEP + 1] = np.take_along_axis(logprobs, kept, 1)
    return numbers._replace(kept=kept, table=table)


@pytest.mark.parametrize("change", [moved, without_the_best])
def test_others_are_told(change):
    assert "scoring differs from the 8 most likely tokens by" in said(change)


def generated(values):
    """vLLM's answer to a generation of four tokens with these log-probs [T, C]."""
    logprobs = SimpleNamespace(logprobs=np.asarray(values))
    return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5, 6, 7, 8], logprobs=logprobs)])


@pytest.mark.parametrize(("off", "message"), [(0.0, ""), (0.5, "generation and scoring give the same tokens log-probs")])
def test_a_generation_that_cannot_name_the_whole_vocabulary_is_compared_with_scoring_all_the_same(monkeypatch, off, message):
    """It once fell to bounds, and nothing compared its log-probs."""
    values = np.array([[-0.5, 1.0]] * 4)

    def ask(request):
        params = request[1]
        if params.prompt_logprobs is None:
            return Failure("at most 20 log-probs") if params.logprobs == V else generated(values)
        return "scored"

    monkeypatch.setattr(self_check.vllm_scoring, "read", lambda *_: Numbers(np.zeros(4), values - off, np.zeros((4, 0), int)))
    if message:
        with pytest.raises(EngineError, match=message):
            self_check.settle(ask, FACTS)
    else:
        found = self_check.settle(ask, FACTS)
        assert (found.entropy_method, found.fallback) == ("bounds", "generation: at most 20 log-probs")


def test_an_engine_that_refuses_the_generations_of_its_work_does_not_start():
    with pytest.raises(EngineError, match=r"refuses to generate \(no such sampling\)"):
        self_check.settle(lambda _: Failure("no such sampling"), FACTS)
