"""The self-check of an engine at its start: are its log-probs and entropies those of the full distribution?

An engine whose log-probs depend on how it is asked computes some of them wrong, and ends with EngineError. Wrong entropies beside
right log-probs are a fault of the hook: bounds take their place.

vLLM's internals may change, so nobody trusts the hook of exact_entropy.py. A request for the whole vocabulary brings every
log-prob of a position, in the same row as the entropy that the hook wrote. Both come from one forward pass. A second request,
of the kind that the engine makes in its work, must then give the same numbers. Each request is made alone: vLLM's V2 runner
answers requests of different width in one batch with the columns of the widest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from actors.inference import vllm_scoring
from actors.inference.vllm_scoring import WAYS, sampling_params
from pipeline.contract import EngineFacts, Failure
from pipeline.errors import EngineError
from pipeline.method.bounds import bounds

Ask = Callable[[tuple[list[int], Any]], Any]  # makes one request alone; the answer is vLLM's, or a Failure

_PROMPT, _RESPONSE = 40, 4  # tokens. A block of 16 or 32 of vLLM's prefix cache fits into the prompt
_SAME_FORWARD = 1e-3  # nats by which an entropy may differ from that of its own row
# Nats by which the numbers of two requests may differ. In half precision they depend on what else is in the batch.
_OTHER_FORWARD = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.3}


def settle(ask: Ask, facts: EngineFacts, keep: int = 0) -> EngineFacts:
    """The facts with the way to score that passes, or with bounds and the reason in `fallback`.

    `facts.scoring` is the first way that is tried. `keep` most likely tokens are asked for at each position, too. Raises
    EngineError when log-probs of a generation are not those of the same generation again, or not those of scoring.
    """
    num_tokens = max(1, min(_RESPONSE, facts.max_model_len // 2))
    prompt = [(3 + 2 * place) % facts.vocab_size for place in range(max(1, min(_PROMPT, facts.max_model_len - num_tokens)))]
    response, logprobs, wrong = _generation(ask, prompt, num_tokens, facts)
    _check_alike(ask, (prompt, response), logprobs, facts)
    for way in WAYS[WAYS.index(facts.scoring) :] if not wrong else ():
        wrong = _scoring(ask, (prompt if way != "prompt" else prompt[-3:], response, way), facts, keep)
        if not wrong:
            return replace(facts, scoring=way)
    return replace(facts, entropy_method="bounds", scoring="prompt", fallback=wrong)


def _generation(ask: Ask, prompt: list[int], num_tokens: int, facts: EngineFacts) -> tuple[list[int], np.ndarray, str]:
    """A greedy response, its log-probs, and what is wrong with its entropies, or "".

    Raises EngineError for its log-probs, and when the engine refuses a generation of the kind that it makes in its work.
    """
    wide, narrow = (
        ask((prompt, sampling_params(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=columns)))
        for columns in (facts.vocab_size, 1)
    )
    if isinstance(narrow, Failure):
        raise EngineError(f"the self-check failed: the engine refuses to generate ({narrow.cause})", facts.engine, "See its log")
    if isinstance(wide, Failure):  # the log-probs can be checked all the same
        single = np.asarray(narrow.outputs[0].logprobs.logprobs, np.float64).reshape(num_tokens, -1)[:, 0]
        return list(narrow.outputs[0].token_ids), single, f"generation: {wide.cause}"
    tokens, again = (np.asarray(answer.outputs[0].token_ids) for answer in (wide, narrow))
    whole, two = (np.asarray(a.outputs[0].logprobs.logprobs, np.float64).reshape(num_tokens, -1) for a in (wide, narrow))
    alike = np.cumprod(tokens == again).astype(bool)  # behind another token the distribution is another
    expected = np.stack((whole[:, 0], whole[:, -1]), 1)[alike]
    _refuse_gap("two generations", expected[:, 0], two[alike][:, 0], facts)
    return tokens.tolist(), whole[:, 0], _wrong("generation", whole[:, 1:], expected, two[alike], facts)


def _check_alike(ask: Ask, one: tuple[list[int], list[int]], logprobs: np.ndarray, facts: EngineFacts) -> None:
    """Raise EngineError when a response has other log-probs when it is scored than when it was generated, [T] nats."""
    answer = ask(vllm_scoring.request(*one, "prompt", 1))
    found = None if isinstance(answer, Failure) else vllm_scoring.read(answer, len(one[1]), 0)
    if found is not None:
        _refuse_gap("generation and scoring", logprobs, found.table[:, 0], facts)


def _refuse_gap(what: str, expected: np.ndarray, got: np.ndarray, facts: EngineFacts) -> None:
    """Raise EngineError when log-probs [T] nats of the same tokens are further apart than rounding explains. NaN is."""
    gap = float(np.abs(expected - got).max(initial=0.0))
    if not gap <= _OTHER_FORWARD[facts.dtype]:
        raise EngineError(
            f"the self-check failed: {what} give the same tokens log-probs that differ by {gap:.2g} nat",
            facts.engine,
            "vLLM computes this model wrong here: use another model, another dtype or another version of vLLM",
        )


def _scoring(ask: Ask, one: tuple[list[int], list[int], str], facts: EngineFacts, keep: int) -> str:
    """What is wrong with the numbers of a scored response, or "". `one` is its prompt, its response and the way."""
    (prompt, response, way), vocab, num_tokens = one, facts.vocab_size, len(one[1])
    if way == "prompt":
        asked, best = vllm_scoring.request(prompt, response, way, vocab), vocab - 1
    else:  # the token, and then all others, of which the hook overwrites the last
        others = [np.delete(np.arange(vocab), token) for token in response]
        named, best = np.column_stack((response, np.stack(others))), 0
        asked = vllm_scoring.asking(prompt, response, named, way)
    found = []
    for request, kept in ((asked, best), (vllm_scoring.request(prompt, response, way, keep + 1, keep), keep)):
        answer = ask(request)
        numbers = None if isinstance(answer, Failure) else vllm_scoring.read(answer, num_tokens, kept)
        if numbers is None:
            return f"scoring: {answer.cause if isinstance(answer, Failure) else 'vLLM gives no log-probs'}"
        found.append(numbers._replace(table=numbers.table.astype(np.float64)))
    wide, narrow = found
    every = wide.table[:, 1:] if way == "prompt" else wide.table  # without the second mention of the token
    expected, got = (numbers.table[:, [0, -1]] for numbers in found)
    wrong = _wrong("scoring", every, expected, got, facts)
    return wrong or _wrong_topk(wide.kept if best else named[:, :-1], every[:, :-1], narrow, facts)


def _wrong_topk(ids: np.ndarray, logprobs: np.ndarray, got: vllm_scoring.Numbers, facts: EngineFacts) -> str:
    """How far the kept tokens are from the most likely ones of a distribution; "" when they are near, or none are kept.

    ids and logprobs [T, V - 1]: all tokens but one, and their log-probs.
    """
    if not (keep := got.kept.shape[1]):
        return ""
    rows, values = np.arange(len(ids))[:, None], got.table[:, 1 : 1 + keep]
    dense = np.full((len(ids), facts.vocab_size), np.nan)
    dense[rows, ids] = logprobs
    off = float(np.nanmax(np.abs(dense[rows, got.kept] - values), initial=0.0))
    dense[rows, got.kept] = np.nan
    missed = float(np.nanmax(dense - values[:, -1:], initial=0.0))
    if max(off, missed) <= _OTHER_FORWARD[facts.dtype]:
        return ""
    return f"scoring differs from the {keep} most likely tokens by {max(off, missed):.2g} nat"


def _wrong(what: str, rows: np.ndarray, expected: np.ndarray, got: np.ndarray, facts: EngineFacts) -> str:
    """How far entropies are from those of their own rows, or numbers from the expected ones; "" when they are near.

    rows [N, V]: the log-probs of all tokens but one, then the entropy. expected and got [n, 2]: log-prob and entropy.
    """

    own = float(np.abs(rows[:, -1] - bounds(rows[:, :-1], facts.vocab_size)[1]).max())  # a single token is left out: no bound
    other = float(np.abs(expected - got).max(initial=0.0))
    if own <= _SAME_FORWARD and other <= _OTHER_FORWARD[facts.dtype]:
        return ""
    return f"{what} differs from the full distribution by {max(own, other):.2g} nat"
