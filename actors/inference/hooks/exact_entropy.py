"""Exact entropy over the full vocabulary from vLLM, which itself returns none: a hook into vLLM's sampler computes it.

vLLM computes the full log-softmax of every position, and keeps `num_logprobs + 1` columns: the token, then the most likely
tokens. With the hook, the **last** column holds the entropy in nats whenever `num_logprobs >= 1`. A request with `logprobs=1`
or `prompt_logprobs=1` thus gets the token's log-prob in column 0 and the entropy in column 1.

The hook would corrupt the log-probs of any other program that uses vLLM in the same environment. The entry point therefore
does nothing unless EGRSD_EXACT_ENTROPY=1 is set. Only `actors.inference.engine` sets it, and vLLM's worker processes inherit it.
Whoever starts a server for a teacher may set it to `served`. An answer over HTTP goes by token id, so the entropy then stands
under the id of another token (actors/served.py).

vLLM has two runners. V1 serves the CPU and older GPUs, and its `Sampler.gather_logprobs` gets log-probs. V2 serves GPUs, and its
`compute_topk_scores` gets logits. V2 can also score token ids that a request names for each position of its prompt. There
`compute_token_logprobs` gets logits and ids, and the hook writes the entropy over the last of them. Where a row names one token
2 k + 2 times, the hook also writes the k best log-probs and their ids (actors.inference.vllm_scoring).

vLLM's internals may change, so the engine does not trust the hook. At its start it compares the column with the entropy of the
full distribution, and uses bounds when they differ.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actors.inference.hooks import replace
from actors.inference.startup import EXACT_ENTROPY
from pipeline.errors import EngineError
from pipeline.method.entropy import entropy_of

SERVED = "served"  # in a server, whose answers go by token id; vLLM's V1 runner only
# These modules of the V2 runner each import `compute_topk_scores` by name, so each needs the hook.
_V2_MODULES = tuple(f"vllm.v1.worker.gpu.sample.{name}" for name in ("logprob", "sampler", "prompt_logprob"))
_V2_NAMED_IDS = _V2_MODULES[2]
_MARK = "exact_entropy"


def install() -> bool:
    """Install the hook in this process's vLLM, once, and return whether it is in place.

    This is the `vllm.general_plugins` entry point, which vLLM calls in its own process and in its workers. Without
    EGRSD_EXACT_ENTROPY=1, or =served in a server, it changes nothing and returns False.
    """
    how = os.environ.get(EXACT_ENTROPY)
    if how not in ("1", SERVED):
        return False
    installed = [replace("vllm.v1.sample.sampler:Sampler", "gather_logprobs", _MARK, _gather_logprobs_hook)]
    if on_gpu_runner() and how == "1":
        installed += [replace(name, "compute_topk_scores", _MARK, topk_scores_hook) for name in _V2_MODULES]
        replace(_V2_NAMED_IDS, "compute_token_logprobs", _MARK, token_logprobs_hook)
    return any(installed)


def on_gpu_runner() -> bool:
    """Whether vLLM's V2 runner is expected in this process: where there is a GPU, or where vLLM was told to use it."""
    return torch.cuda.is_available() or os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


def check_origin() -> None:
    """Raise EngineError when the hook in this process's vLLM is another copy's, whose plugin came first."""
    with contextlib.suppress(ImportError, AttributeError):
        from vllm.v1.sample.sampler import Sampler

        hook = Sampler.gather_logprobs
        origin = hook.__globals__["__file__"]
        if hasattr(hook, _MARK) and origin != __file__:
            raise EngineError(
                f"vLLM has the entropy hook of another copy: {origin}", __file__, "Remove that copy from this environment"
            )


def _gather_logprobs_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """The V1 sampler's `gather_logprobs`, changed to return the entropy in the last column."""
    from vllm.v1.outputs import LogprobsTensors

    def gather_logprobs(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> Any:
        """Columns [N, k + 1] from log-probs [N, V]: the token's, those of the k - 1 best tokens, and the entropy in nats."""
        if num_logprobs < 1:
            return original(logprobs, num_logprobs, token_ids)
        # Ranks are 0, because nobody reads them and counting them costs more than the entropy.
        token, best = token_ids[:, None], logprobs.topk(num_logprobs - 1, dim=-1)
        last = _place_of_its_own(logprobs, token, num_logprobs) if os.environ[EXACT_ENTROPY] == SERVED else token
        ids = torch.cat((token, best.indices, last), 1).to(torch.int32)
        columns = torch.cat((logprobs.gather(-1, token), best.values, entropy_of(logprobs)[:, None]), 1)
        return LogprobsTensors(ids, columns, torch.zeros_like(token_ids))

    return gather_logprobs


def _place_of_its_own(logprobs: Tensor, token: Tensor, num_logprobs: int) -> Tensor:
    """Ids [N, 1] under which a server tells the entropies: of each row one that no other column has, since answers go by id."""
    next_best = logprobs.topk(min(num_logprobs + 1, logprobs.shape[-1]), dim=-1).indices[:, num_logprobs - 1 :]
    return torch.where(next_best[:, :1] == token, next_best[:, -1:], next_best[:, :1])


def topk_scores_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """The V2 runner's `compute_topk_scores`, changed to return the entropy in the last column of its scores [N, k + 1]."""

    def compute_topk_scores(logits: Tensor, num_logprobs: int, sampled_token_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the original on logits [N, V], then replace the last score of each row by the entropy in nats."""
        most = logits.shape[-1]
        result = original(logits, min(num_logprobs, most), sampled_token_ids, *args, **kwargs)
        if num_logprobs < 1 or kwargs.get("max_per_req_token_ids") or kwargs.get("logits_mode"):
            return result
        if num_logprobs > most:  # all tokens, and the entropy beside them
            tables = (result.logprob_token_ids, result.logprobs)
            ids, columns = (torch.cat((table, table[:, :1]), 1) for table in tables)
            result = result._replace(logprob_token_ids=ids, logprobs=columns)
        result.logprobs[:, -1] = _entropies(logits)
        return result

    return compute_topk_scores


def token_logprobs_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """The V2 runner's `compute_token_logprobs` for named ids, changed to return the entropy in the last column [N, k], k > 1.

    A row that names one token 2 k + 2 times gets its log-prob, the k best log-probs, their ids, and the entropy.
    """

    def compute_token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
        """Call the original on logits [N, V], then replace the last log-prob of each row by the entropy in nats."""
        width, keep = token_ids.shape[1], _kept(token_ids.shape[1], logits.shape[-1])
        if keep:
            asks, best = (token_ids == token_ids[:, :1]).all(1, keepdim=True), logits.topk(keep, dim=-1).indices
            named = torch.where(asks, best, token_ids[:, 1 : 1 + keep])
            token_ids = torch.cat((token_ids[:, :1], named, token_ids[:, 1 + keep :]), 1)
        result: Tensor = original(logits, token_ids)
        if keep:
            result[:, 1 + keep : -1] = torch.where(asks, best.to(result.dtype), result[:, 1 + keep : -1])
        if width > 1:
            result[:, -1] = _entropies(logits)
        return result

    return compute_token_logprobs


def _kept(width: int, vocab_size: int) -> int:
    """The number of most likely tokens that a row of `width` equal ids asks for; 0 when no request has that width."""
    keep = width // 2 - 1
    return keep if width % 2 == 0 and 0 < keep <= vocab_size else 0


def _entropies(logits: Tensor) -> Tensor:
    """Entropies float32 [N] nats of logits [N, V], computed in blocks so that no second [N, V] tensor exists."""
    rows = max(1, (1 << 24) // logits.shape[-1])
    return torch.cat([entropy_of(block.log_softmax(-1, dtype=torch.float32)) for block in logits.split(rows)])
