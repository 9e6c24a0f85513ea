"""vLLM's prefix cache, so that a scored sequence may read it: a hit ends before the first position that is scored.

A position that comes from the cache has no hidden state. vLLM has no scores for it, and drops those of the whole request.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from actors.inference.hooks import replace
from actors.inference.hooks.exact_entropy import on_gpu_runner
from actors.inference.hooks.prompt_logprobs import FIRST

if TYPE_CHECKING:
    from vllm import SamplingParams

_LOOKS_UP = "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator"


def install() -> bool:
    """Change this process's vLLM, once. False when it has no such place: then no scored sequence may read the cache."""
    try:
        if not hasattr(pkgutil.resolve_name(_LOOKS_UP), "find_longest_cache_hit"):
            return False
    except (ImportError, AttributeError):
        return False
    return replace("vllm.v1.core.kv_cache_manager:KVCacheManager", "get_computed_blocks", "caps_hits", _capping)


def _capping(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_computed_blocks(self: Any, request: Any) -> Any:
        """The cached blocks of a request, without those that reach its first scored position."""
        start = first_scored(request.sampling_params)
        if start is None:
            return original(self, request)
        find = self.coordinator.find_longest_cache_hit
        self.coordinator.find_longest_cache_hit = lambda hashes, most: find(hashes, min(most, start))
        try:
            return original(self, request)
        finally:
            del self.coordinator.find_longest_cache_hit  # the coordinator's own is found again

    return get_computed_blocks


def first_scored(params: SamplingParams) -> int | None:
    """The first position of a prompt whose log-probs vLLM must compute for a request. None when it asks for none.

    The V2 runner knows no FIRST, and asks for the log-probs of the whole prompt.
    """
    if params.prompt_logprobs is None:
        return params.prompt_logprob_start
    return 0 if on_gpu_runner() else int((params.extra_args or {}).get(FIRST, 0))
