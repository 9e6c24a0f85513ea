"""Do trainer and engines compute the same model? It is asked before anything is paid for, of every model but the one that ships.

The trainer writes what the base answers to a fixed sequence as soon as it has loaded it, alone and with a random adapter. The
driver has an engine score the same. A weight that one side does not load shows here, and so does a layer whose adapter it does
not apply. The gap of every round (gap.py) is the finer check, and needs traces. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from pipeline.config import Run
from pipeline.contract import Engines, Failure, Policy, Sequence
from pipeline.errors import EngineError, TrainingError
from pipeline.models.resolve import MODEL_NAME
from pipeline.notices import NOTICE_S, late
from pipeline.store.directory import Store
from pipeline.store.documents import Document
from pipeline.training.student.whole import Logprobs, Tokens

FILE = "train/base.json"
ADAPTER = "train/probe"
ROOM = 10.0  # times train.logprob_gap: forty arbitrary tokens are further apart than the traces of a round


class Answered(Document):
    """train/base.json: ids of a sequence, and the trainer's log-probs in nats of all but its first token.

    logprobs: under the base. adapted: with the random adapter at `train/probe`; None with whole weights.
    """

    tokens: Tokens
    logprobs: Logprobs
    adapted: Logprobs | None = None


def is_asked(run: Run) -> bool:
    """Whether a run compares. Where trainer and engine take turns on one card, the trainer loads the model after a round."""
    return run.model.path != MODEL_NAME and not run.engines.rollout.colocate


def compare(store: Store, run: Run, engines: Mapping[str, Engines], look: Callable[[], None]) -> None:
    """Wait until the trainer has loaded the model, and compare its base with the engines'. `look` raises when the trainer ended.

    Raises as `check`.
    """
    if not is_asked(run):
        return
    with late("base", f"the trainer has loaded the model for {NOTICE_S:g} s so far, and the run waits to compare its base."):
        while (told := store.read_document(FILE, Answered, "Delete the file: the trainer writes it again")) is None:
            look()
            time.sleep(store.poll_s)
        check(run, store, told, engines)


def check(run: Run, store: Store, trainer: Answered, engines: Mapping[str, Engines]) -> None:
    """Raise TrainingError when an engine that scores answers otherwise than the trainer. A fake engine is not asked.

    Raises EngineError when the engine cannot score the sequence, and ModelError when it cannot load an adapter of this run.
    """
    pool = engines.get("score") or engines.get("rollout")
    if pool is None or pool.facts().engine == "fake":
        return
    likely = "Likely: one side does not load a weight. Use another model, or another dtype"
    _check_alike(run, pool, Policy(0), (trainer.tokens, trainer.logprobs), ("the base", likely))
    if trainer.adapted is not None:
        likely = (
            "Likely: the engine applies the adapter of a layer otherwise than peft. Take that layer out of model.lora_targets"
        )
        adapter = Policy(0, store.locate(ADAPTER))
        _check_alike(run, pool, adapter, (trainer.tokens, trainer.adapted), ("a random adapter", likely))
        store.delete(ADAPTER)


def _check_alike(
    run: Run, pool: Engines, policy: Policy, expected: tuple[tuple[int, ...], tuple[float, ...]], words: tuple[str, str]
) -> None:
    """Raise TrainingError when the log-probs [T] of the tokens are not those that are expected. words: of what, likely cause."""
    tokens, logprobs = list(expected[0]), np.asarray(expected[1])
    [found] = pool.score([Sequence(tokens[:1], tokens[1:])], policy)
    if isinstance(found, Failure):
        raise EngineError(f"cannot score a sequence with {words[0]} ({found.cause})", run.model.path, "Look at its log")
    gaps, most = np.abs(found.logprobs.astype(np.float64) - logprobs), ROOM * run.accepted_gap[0]
    if not gaps.mean() <= most:
        what = (
            f"trainer and engine compute another model: their log-probs of {words[0]} differ by {gaps.mean():.2g} nat on average "
            f"(accepted: {most:g}) and by {gaps.max():.2g} at most"
        )
        raise TrainingError(what, run.model.path, f"{words[1]}. train.logprob_gap sets what is accepted, ten times as much here")
