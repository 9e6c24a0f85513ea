"""Exact full-vocabulary entropy out of vLLM, which returns none itself.

vLLM computes every position's full log-softmax and then keeps `num_logprobs + 1` columns of it: the token, then the most
likely ones. With the hook, a request for `num_logprobs >= 1` finds the entropy (nats) in the **last** column: ask for
`logprobs=1` or `prompt_logprobs=1`, read the token's log-prob in column 0 and the entropy in column 1.

That would corrupt the log-probs of any other program that happens to run vLLM where this package is installed. So the
entry point does nothing unless EGRSD_EXACT_ENTROPY=1 stands in the environment, which only `actors.engine` sets, for its own
process and the worker processes that vLLM starts from it.

Two samplers exist: V1 (`Sampler.gather_logprobs`, CPU and older GPU runners, gets log-probs) and V2 (the GPU runner's
`compute_topk_scores`, gets logits). Internals of vLLM may change, so nothing here is trusted: the engine compares the column
with the full distribution when it starts, and falls back to bounds where they differ.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actors.startup import EXACT_ENTROPY

# exp(-200) is 0 in fp32, so a masked logit (-inf) adds 0 * -200 = 0, where 0 * -inf would be NaN. A real NaN stays one.
_FLOOR = -200.0
# Modules of the V2 runner that hold `compute_topk_scores` by name.
_V2_MODULES = tuple(f"vllm.v1.worker.gpu.sample.{name}" for name in ("logprob", "sampler", "prompt_logprob"))


def install() -> bool:
    """Put the hook into this process's vLLM and say whether it is in place; again does nothing more.

    The `vllm.general_plugins` entry point: vLLM calls it in its own process and in its workers. False, and nothing touched,
    unless EGRSD_EXACT_ENTROPY=1.
    """
    if os.environ.get(EXACT_ENTROPY) != "1":
        return False
    installed = _install_v1()
    if torch.cuda.is_available():
        installed = _install_v2() or installed
    return installed


def entropy_of(logprobs: Tensor) -> Tensor:
    """H = -sum_v p log p of normalised rows (2605.13255, Eq. 4).

    logprobs [N, V] fp32 nats, -inf allowed -> [N] fp32 nats. Blocks of rows keep the temporaries in cache (CPU) or small (GPU):
    no second [N, V] exists.
    """
    rows = max(1, (1 << 16 if logprobs.device.type == "cpu" else 1 << 24) // logprobs.shape[-1])
    return torch.cat([_block_entropy(block) for block in logprobs.split(rows)])


def _block_entropy(block: Tensor) -> Tensor:
    finite = block.clamp(min=_FLOOR)
    return finite.exp().mul_(finite).sum(-1).neg_()


def _install_v1() -> bool:
    try:
        from vllm.v1.outputs import LogprobsTensors
        from vllm.v1.sample.sampler import Sampler

        original = Sampler.gather_logprobs
    except (ImportError, AttributeError):
        return False
    if hasattr(original, "exact_entropy"):
        return True

    @functools.wraps(original)
    def gather_logprobs(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> Any:
        """Columns [N, k + 1] of log-probs [N, V]: the token's, the k - 1 best, the entropy (nats)."""
        if num_logprobs < 1:
            return original(logprobs, num_logprobs, token_ids)
        # Ranks stay 0: no one here reads them, and counting them costs more than the entropy.
        token, best = token_ids[:, None], logprobs.topk(num_logprobs - 1, dim=-1)
        ids = torch.cat((token, best.indices, token), 1).to(torch.int32)
        columns = torch.cat((logprobs.gather(-1, token), best.values, entropy_of(logprobs)[:, None]), 1)
        return LogprobsTensors(ids, columns, torch.zeros_like(token_ids))

    gather_logprobs.exact_entropy = True  # type: ignore[attr-defined]
    Sampler.gather_logprobs = staticmethod(gather_logprobs)  # type: ignore[method-assign]
    return True


def _install_v2() -> bool:
    found = False
    for name in _V2_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        original = getattr(module, "compute_topk_scores", None)
        if original is not None:
            found = True
            if not hasattr(original, "exact_entropy"):
                module.compute_topk_scores = topk_scores_hook(original)  # type: ignore[attr-defined]
    return found


def topk_scores_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """`compute_topk_scores` of the V2 runner with the entropy in the last column of logits [N, V]'s scores."""

    @functools.wraps(original)
    def compute_topk_scores(logits: Tensor, num_logprobs: int, sampled_token_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original; of the logits [N, V], the entropy (nats) takes the last score's place."""
        result = original(logits, num_logprobs, sampled_token_ids, *args, **kwargs)
        if num_logprobs < 1 or kwargs.get("max_per_req_token_ids") or kwargs.get("logits_mode"):
            return result
        rows = max(1, (1 << 24) // logits.shape[-1])
        blocks = [entropy_of(block.log_softmax(-1, dtype=torch.float32)) for block in logits.split(rows)]
        result.logprobs[:, -1] = torch.cat(blocks)
        return result

    compute_topk_scores.exact_entropy = True  # type: ignore[attr-defined]
    return compute_topk_scores
