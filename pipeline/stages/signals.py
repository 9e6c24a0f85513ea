"""Checks the numbers of an engine's answers: finite, and possible for log-probs, entropies and ids of its vocabulary."""

from __future__ import annotations

import numpy as np

from pipeline.contract import Generation, Reject, Score
from pipeline.errors import EngineError
from pipeline.stages.tables import Draft
from pipeline.store.possible import limits

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
    return None


def refuse_many(draft: Draft, answered: list[int], where: str) -> None:
    """Raise EngineError when most of the `answered` rows were rejected for their numbers: then the engine is broken."""
    rows = [row for row in answered if draft.reasons[row] in (Reject.NON_FINITE, Reject.IMPOSSIBLE)]
    if len(rows) > max(FEW, len(answered) / 2):
        what = f"broke the contract on its numbers in {len(rows)} of {len(answered)} answers, such as {draft.details[rows[0]]}"
        raise EngineError(f"the engine {what}", where, "Check its dtype, its version and its hardware, and run the command again")
