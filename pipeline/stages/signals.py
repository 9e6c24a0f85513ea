"""Checks the numbers of an engine's answers: finite, and possible for log-probs, entropies and ids of its vocabulary."""

from __future__ import annotations

import numpy as np

from pipeline.contract import TOPK, Generation, Reject, Score
from pipeline.errors import EngineError
from pipeline.stages.tables import Draft
from pipeline.store.possible import limits, topk_fault, unlike_topk

FEW = 4  # broken answers of a shard that never count as many


def broken(answer: Generation | Score, vocab_size: int) -> tuple[Reject, str] | None:
    """Why an answer with a token cannot be used: the reject reason and its detail. None for a good answer."""
    parts = (("id", "token id", answer.tokens), ("logprob", "log-prob", answer.logprobs), ("entropy", "entropy", answer.entropy))
    for _, name, values in parts:
        if not np.isfinite(values).all():
            return Reject.NON_FINITE, name
    for holds, name, values in parts:
        low, high = limits(holds, vocab_size)
        if values.min() < low or values.max() > high:
            worst = values.min() if values.min() < low else values.max()
            return Reject.IMPOSSIBLE, f"{name} {worst:g}, and {low:g} to {high:g} are possible"
    if len({len(values) for _, _, values in parts}) > 1:
        return Reject.IMPOSSIBLE, "token ids, log-probs and entropies differ in number"
    return _broken_topk(answer, vocab_size) if isinstance(answer, Score) else None


def _broken_topk(answer: Score, vocab_size: int) -> tuple[Reject, str] | None:
    """Why the kept tokens of an answer cannot be used, or do not fit the log-prob of the token that was scored."""
    ids, logprobs = answer.topk_tokens, answer.topk_logprobs
    if ids is None or logprobs is None:
        return None
    if not np.isfinite(logprobs).all():
        return Reject.NON_FINITE, "top-k log-prob"
    if ids.shape != logprobs.shape or len(ids) != len(answer.tokens):
        return Reject.IMPOSSIBLE, f"top-k ids {ids.shape} and log-probs {logprobs.shape} of {len(answer.tokens)} tokens"
    if ids.min() < 0 or ids.max() >= vocab_size:
        return Reject.IMPOSSIBLE, f"top-k: ids {ids.min()} to {ids.max()}, and 0 to {vocab_size - 1} are possible"
    wrong = topk_fault(TOPK[0], ids) or topk_fault(TOPK[1], logprobs)
    wrong = wrong or unlike_topk(answer.tokens, answer.logprobs, ids, logprobs)
    return (Reject.IMPOSSIBLE, f"top-k: {wrong}") if wrong else None


def refuse_many(draft: Draft, answered: list[int], where: str) -> None:
    """Raise EngineError when most of the `answered` rows were rejected for their numbers: then the engine is broken."""
    rows = [row for row in answered if draft.reasons[row] in (Reject.NON_FINITE, Reject.IMPOSSIBLE)]
    if len(rows) > max(FEW, len(answered) / 2):
        what = f"broke the contract on its numbers in {len(rows)} of {len(answered)} answers, such as {draft.details[rows[0]]}"
        raise EngineError(f"the engine {what}", where, "Check its dtype, its version and its hardware, and run the command again")
