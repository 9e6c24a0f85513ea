"""Do trainer and engines compute the same model? It is asked before anything is paid for, of every model but the one that ships.

Where a driver waits for round 0, the trainer writes what the base answers to a fixed sequence as soon as it has loaded it. It
answers alone, and with a random adapter of each target of LoRA. The driver has an engine score the same. A weight that one side
does not load shows here, and so does a layer whose adapter it does not apply. The gap of every round (gap.py) is the finer check,
and needs traces. No torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from pipeline.config import Run
from pipeline.contract import Engines, Failure, Policy, Sequence
from pipeline.errors import EngineError, TrainingError
from pipeline.models.resolve import MODEL_NAME
from pipeline.notices import NOTICE_S, late
from pipeline.store.directory import Store
from pipeline.store.documents import Document
from pipeline.training.student.whole import Logprobs, Tokens

T = TypeVar("T", bound=Document)
log = logging.getLogger(__name__)

FILE = "train/base.json"
ADAPTER = "train/probe"
MOVED = 0.6  # nats on average by which an adapter moves log-probs at least: half of it is far above what half precision loses
ROOM = 10.0  # times train.logprob_gap: forty arbitrary tokens are further apart than the traces of a round


class Adapted(Document):
    """The trainer's log-probs with the random adapter of one target of LoRA, which lies at train/probe/TARGET."""

    target: str
    logprobs: Logprobs


class Answered(Document):
    """train/base.json: ids of a sequence, and the trainer's log-probs in nats of all but its first token.

    logprobs: under the base. adapted: with a random adapter of each target; none with whole weights.
    """

    tokens: Tokens
    logprobs: Logprobs
    adapted: tuple[Adapted, ...] = ()


def is_asked(run: Run) -> bool:
    """Whether a run compares. Where trainer and engine take turns on one card, the trainer loads the model after a round."""
    return run.model.path != MODEL_NAME and not run.engines.rollout.colocate


def compare(store: Store, run: Run, engines: Mapping[str, Engines], look: Callable[[], None]) -> None:
    """Wait until the trainer has loaded the model, and compare its base with the engines'. `look` raises when the trainer ended.

    Raises as `check`.
    """
    if not is_asked(run):
        return
    with late("base", f"trainer and engines load the model: the run has waited {NOTICE_S:g} s to compare their answers."):
        told = awaited(store, FILE, Answered, look)
        check(run, store, told, engines)


def awaited(store: Store, file: str, kind: type[T], look: Callable[[], None]) -> T:
    """The document that the trainer writes to `file`, once it is there. `look` raises when the trainer ended."""
    while (told := store.read_document(file, kind, "Delete the file: the trainer writes it again")) is None:
        look()
        time.sleep(store.poll_s)
    return told


def check(run: Run, store: Store, trainer: Answered, engines: Mapping[str, Engines]) -> None:
    """Raise TrainingError when an engine that scores answers otherwise than the trainer. A fake engine is not asked.

    Raises EngineError when the engine cannot score the sequence, and ModelError when it cannot load an adapter of this run.
    """
    pool = engines.get("score") or engines.get("rollout")
    if pool is None or pool.facts().engine == "fake":
        return
    likely = "Likely: one side does not load a weight. Use another model, or another dtype"
    most = ROOM * run.accepted_gap[0]
    numerics = _check_alike(run, pool, Policy(0), (trainer.tokens, trainer.logprobs, most), ("the base", likely))
    for one in trainer.adapted:  # each alone: of all together, half precision would accept that one is left out
        likely = f"Likely: the engine applies it otherwise than peft. Take {one.target} out of model.lora_targets"
        moved = float(np.abs(np.subtract(one.logprobs, trainer.logprobs)).mean())
        # an engine that applies nothing is `moved` away, which half precision would accept
        expected = trainer.tokens, one.logprobs, min(most, max(moved / 2, 3 * numerics + run.accepted_gap[0]))
        adapter = Policy(0, store.locate(f"{ADAPTER}/{one.target}"))
        _check_alike(run, pool, adapter, expected, (f"a random adapter of {one.target}", likely))
    store.delete(ADAPTER)


def _check_alike(
    run: Run, pool: Engines, policy: Policy, expected: tuple[tuple[int, ...], tuple[float, ...], float], words: tuple[str, str]
) -> float:
    """The mean gap in nats of the tokens' log-probs to those that are expected. Raises TrainingError when it is too large.

    words: of what, likely cause.
    """
    tokens, logprobs, most = list(expected[0]), np.asarray(expected[1]), expected[2]
    [found] = pool.score([Sequence(tokens[:1], tokens[1:])], policy)
    if isinstance(found, Failure):
        raise EngineError(f"cannot score a sequence with {words[0]} ({found.cause})", run.model.path, "Look at its log")
    gaps = np.abs(found.logprobs.astype(np.float64) - logprobs)
    log.info("trainer and engine differ by %.2g nat on average under %s (accepted: %.2g)", gaps.mean(), words[0], most)
    if not gaps.mean() <= most:
        what = (
            f"trainer and engine compute another model: their log-probs of {words[0]} differ by {gaps.mean():.2g} nat on average "
            f"(accepted: {most:.2g}) and by {gaps.max():.2g} at most"
        )
        raise TrainingError(what, run.model.path, f"{words[1]}. train.logprob_gap sets what is accepted, ten times as much here")
    return float(gaps.mean())
