"""Can an engine's numbers stand beside those of the others? Its facts are compared, and on a shared card its answers.

An engine that slept, or that took the place of one, is probed: does it answer a fixed sequence as before? Elsewhere an engine
that was woken gave every token the log-prob -log V, and nobody saw it. Here no answer counts before the probe has passed.
"""

from __future__ import annotations

import math
from dataclasses import fields

from pipeline.contract import EngineFacts, Sequence

STRANGE = "answers a fixed sequence otherwise than before"  # the cause of such an engine's end begins so
# Nats by which a log-prob may differ. The sequence is alone in the engine each time, so only rounding can differ.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.3}
_PROMPT, _RESPONSE = 24, 16  # tokens

Probed = dict[int, list[float]]  # log-probs of the response in nats, by policy version: 0 is the base


def sequence(facts: EngineFacts) -> Sequence:
    """The fixed sequence. It fits the vocabulary and the window of every engine of a pool."""
    response = max(1, min(_RESPONSE, facts.max_model_len // 2))
    prompt = max(1, min(_PROMPT, facts.max_model_len - response))
    ids = [(5 + 3 * place) % facts.vocab_size for place in range(prompt + response)]
    return Sequence(ids[:prompt], ids[prompt:])


def difference(before: Probed, now: Probed, dtype: str) -> str:
    """How an engine answers otherwise than before, over the policies that `before` has; "" when it does not."""
    for version, expected in before.items():
        got = now.get(version, [])
        gaps = [abs(a - b) for a, b in zip(expected, got, strict=True)] if len(got) == len(expected) else [math.inf]
        worst = math.nan if any(map(math.isnan, gaps)) else max(gaps)
        if not worst <= TOLERANCE[dtype]:  # NaN too
            return f"{STRANGE}: log-probs of policy {version} differ by {worst:.3g} nat"
    return ""


def disagreement(facts: EngineFacts, first: EngineFacts, whose: str = "the first engine's") -> str:
    """In which facts an engine differs from the first one, in words; "" when their numbers mean the same.

    `whose` says whose facts the first ones are.
    """
    return "; ".join(
        f"{fact.name} is {getattr(facts, fact.name)!r}, {whose} {getattr(first, fact.name)!r}"
        for fact in fields(facts)
        if fact.compare and getattr(facts, fact.name) != getattr(first, fact.name)
    )
