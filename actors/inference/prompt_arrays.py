"""Log-probs of a prompt stay arrays on their way out of vLLM, which would make a Python object of each number.

With 32 kept tokens a position has 34 numbers, and their objects cost as much time as a forward pass of a tiny model. Only
requests for flat log-probs without text are answered so: those of this project's engines.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np


class Arrays(NamedTuple):
    """What vLLM's FlatLogprobs holds of N positions with k numbers each: ids int32 [N k] and log-probs float32 [N k]."""

    token_ids: np.ndarray
    logprobs: np.ndarray


def install() -> bool:
    """Change this process's vLLM, once. False when vLLM has no such place: then it answers with lists."""
    try:
        from vllm.logprobs import FlatLogprobs
        from vllm.v1.engine.logprobs import LogprobsProcessor

        original = LogprobsProcessor._update_prompt_logprobs
    except (ImportError, AttributeError):
        return False
    if hasattr(original, "arrays"):
        return True

    @functools.wraps(original)
    def update(self: Any, tensors: Any) -> None:
        """Take the log-probs of a whole prompt. They come in one piece, also from a prompt that was computed in chunks."""
        if self.tokenizer is not None or not isinstance(self.prompt_logprobs, FlatLogprobs):
            original(self, tensors)
            return
        self.prompt_logprobs = Arrays(tensors.logprob_token_ids.numpy().ravel(), tensors.logprobs.numpy().ravel())

    update.arrays = True  # type: ignore[attr-defined]
    LogprobsProcessor._update_prompt_logprobs = update  # type: ignore[method-assign, assignment]
    return True
