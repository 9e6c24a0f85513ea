"""vLLM's log-probs of a prompt: computed only where somebody wants them, and handed out as arrays.

vLLM's V1 runner puts every position of a prompt through the output head, one request after the other. Of a scored sequence only
the response is wanted, and the head takes half of the time. vLLM then makes a Python object of each number. With 32 kept tokens a
position has 34 numbers, and their objects cost as much time as a forward pass of a tiny model. Only requests for flat log-probs
without text are answered with arrays: those of this project's engines.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from actors.inference.hooks import replace

FIRST = "egrsd_first"  # the first position whose log-probs a request wants, among vLLM's extra arguments


class Arrays(NamedTuple):
    """What vLLM's FlatLogprobs holds of N positions with k numbers each: ids int32 [N k] and log-probs float32 [N k]."""

    token_ids: np.ndarray
    logprobs: np.ndarray


def install() -> bool:
    """Change this process's vLLM, once. False when vLLM has no such places: then it computes all, or answers with lists."""
    skips = replace("vllm.v1.worker.gpu_model_runner:GPUModelRunner", "_get_prompt_logprobs_dict", "skips", from_first)
    return replace("vllm.v1.engine.logprobs:LogprobsProcessor", "_update_prompt_logprobs", "arrays", _keeping_arrays) and skips


def _keeping_arrays(original: Any) -> Any:
    from vllm.logprobs import FlatLogprobs

    def update(self: Any, tensors: Any) -> None:
        """Take the log-probs of a whole prompt. They come in one piece, also from a prompt that was computed in chunks."""
        if self.tokenizer is not None or not isinstance(self.prompt_logprobs, FlatLogprobs):
            original(self, tensors)
            return
        self.prompt_logprobs = Arrays(tensors.logprob_token_ids.numpy().ravel(), tensors.logprobs.numpy().ravel())

    return update


def from_first(original: Any) -> Any:
    """vLLM's `_get_prompt_logprobs_dict`, changed to compute the log-probs of a request from its FIRST position on.

    Rows before that position are not filled. The original is shown each request as if so much of its prompt had been computed in
    an earlier step.
    """

    def get(self: Any, hidden_states: Any, num_scheduled_tokens: dict[str, int]) -> Any:
        """Call the original with later starts, and with fewer tokens, of the requests that name a position."""
        skips = {name: _skipped(self.requests[name]) for name in self.num_prompt_logprobs if name in num_scheduled_tokens}
        if not any(skips.values()):
            return original(self, hidden_states, num_scheduled_tokens)
        starts = self.query_start_loc.np.copy()  # vLLM's own may still be on its way to a GPU
        for name, skip in skips.items():
            starts[self.input_batch.req_id_to_index[name]] += skip
            self.requests[name].num_computed_tokens += skip
        try:
            fewer = {name: count - skips.get(name, 0) for name, count in num_scheduled_tokens.items()}
            return original(_Later(self, starts), hidden_states, fewer)
        finally:
            for name, skip in skips.items():
                self.requests[name].num_computed_tokens -= skip

    return get


class _Later:
    """A runner of vLLM whose requests start later in the batch: `starts` takes the place of its query_start_loc."""

    def __init__(self, runner: Any, starts: np.ndarray) -> None:
        self._runner, self.query_start_loc = runner, SimpleNamespace(np=starts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def _skipped(request: Any) -> int:
    """Tokens of this step whose log-probs the request does not want."""
    first = (request.sampling_params.extra_args or {}).get(FIRST, 0)
    return max(0, int(first) - request.num_computed_tokens)
