"""Whether a model computes a packed micro-batch as it computes padded ones. Asked once, before the first round."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Run
from pipeline.errors import ModelError
from pipeline.training.batches import MicroBatch, RaggedColumn, Traces, share
from pipeline.training.packing import attention

if TYPE_CHECKING:
    from pipeline.training.student.student import Student

log = logging.getLogger(__name__)

# Norm of the difference of two hidden states, over their own. Half precision rounds each layer to 3 digits.
SAME = {"float32": 1e-3, "bfloat16": 0.1}
APART = {"float32": 1e-5, "bfloat16": 1e-2}
GROUPS = ((9, (7, 2, 13)), (4, (11, 5)), (6, (3,)))  # tokens of a prompt, and of its responses


@torch.no_grad()
def prepare(student: Student, run: Run, device: torch.device) -> bool:
    """Let the model of a run take packed micro-batches, if `train.packing` may ask for them. Returns whether it does.

    Raises ModelError where they are asked for and the model cannot compute them.
    """
    train, base = run.train, student.base
    if train.packing == "padded" or (train.packing == "auto" and (device.type == "cuda" or run.model.lora_dropout > 0)):
        return False
    why = attention.install(base) or _difference(student, train.dtype, device)
    if not why:
        return True
    attention.uninstall(base)
    if train.packing == "packed":
        raise ModelError(f"cannot run packed micro-batches: {why}", run.model.path, "Set train.packing padded, or auto")
    log.info("micro-batches of %s are padded: %s", run.model.path, why)
    return False


def _difference(student: Student, dtype: str, device: torch.device) -> str:
    """What is wrong with packed hidden states of a few made-up traces. "" if nothing is."""
    try:
        padded, packed = _states(student, 0, device, packed=False), _states(student, 0, device, packed=True)
        other = _states(student, 1, device, packed=True)
    except Exception as error:  # an architecture may fail anywhere inside when its mask is another
        return f"{type(error).__name__}: {error}"
    gap = max(_relative(packed[name], padded[name]) for name in padded)
    if not gap <= SAME[dtype]:
        return f"its hidden states are off by {gap:.2g} of their size"
    leak = max(_relative(other[name], packed[name]) for name in packed if name != "0-0")
    return "" if leak <= APART[dtype] else f"a response sees another one, which moves its hidden states by {leak:.2g}"


def _relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


def _states(student: Student, seed: int, device: torch.device, packed: bool) -> dict[str, Tensor]:
    """Hidden states [T, H] of every made-up trace. `seed` changes the tokens of the first response only."""
    traces, found = _traces(student.vocab_size, seed), dict[str, Tensor]()
    rows = np.arange(len(traces.trace_ids))
    for micro in (micro.to(device) for micro in share(traces, rows, 0, 1, 10_000, packed)):
        states = student.states(micro.tokens, micro.sources, micro.layout).float()
        found |= dict(zip(micro.trace_ids, states.split(_lengths(micro)), strict=True))
    return found


def _lengths(micro: MicroBatch) -> list[int]:
    return micro.mask.sum(1).tolist()  # type: ignore[no-any-return]


def _traces(vocab: int, seed: int) -> Traces:
    """Traces of GROUPS, of random tokens."""
    rng, changed = np.random.default_rng(0), np.random.default_rng(seed)
    prompts, responses, ids = [], [], list[str]()
    for place, (prompt, lengths) in enumerate(GROUPS):
        tokens = rng.integers(1, vocab, prompt)
        for number, length in enumerate(lengths):
            prompts.append(tokens)
            responses.append((rng if ids else changed).integers(1, vocab, length))
            ids.append(f"{place}-{number}")
    columns: dict[str, Any] = {"prompt_tokens": _column(prompts), "response_tokens": _column(responses)}
    signals = _column([np.zeros(len(r), np.float32) for r in responses])
    columns |= dict.fromkeys(("teacher_logprobs", "student_logprobs", "teacher_entropy"), signals)
    return Traces(0, np.array(ids), advantage=np.zeros(len(ids), np.float32), num_rejected=0, **columns)


def _column(rows: list[np.ndarray]) -> RaggedColumn:
    lengths = np.array([len(row) for row in rows])
    return RaggedColumn(np.concatenate(rows), np.cumsum(lengths) - lengths, lengths)
