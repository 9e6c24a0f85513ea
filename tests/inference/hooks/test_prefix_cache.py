"""Hits of vLLM's prefix cache end before the first scored position, for both ways to name it."""

from types import SimpleNamespace

import pytest

from actors.inference import vllm_scoring
from actors.inference.hooks import prefix_cache
from actors.inference.vllm_scoring import sampling_params

PLACE = "vllm.v1.core.kv_cache_manager:KVCacheManager"


class Coordinator:
    def find_longest_cache_hit(self, hashes, most):
        """All blocks of 16 tokens that fit into `most`."""
        return [hashes[: most // 16]], most // 16 * 16, 0


@pytest.fixture
def found(shipped, hooked):
    """What vLLM's own manager finds in the cache for a request of 100 tokens, all of whose blocks are there."""
    manager_class = hooked(shipped(PLACE, "get_computed_blocks"), "get_computed_blocks", prefix_cache.install)
    manager = object.__new__(manager_class)
    manager.__dict__.update(enable_caching=True, enable_kv_cache_events=False, coordinator=Coordinator())
    manager.create_kv_cache_blocks = lambda blocks: blocks
    manager.empty_kv_cache_blocks = []

    def find(params):
        request = SimpleNamespace(
            sampling_params=params,
            skip_reading_prefix_cache=params.skip_reading_prefix_cache,
            num_tokens=100,
            block_hashes=list(range(6)),
        )
        tokens = manager.get_computed_blocks(request)[1]
        assert "find_longest_cache_hit" not in vars(manager.coordinator)
        return tokens

    return find


@pytest.mark.parametrize("way", ["prompt", "shared"])
@pytest.mark.parametrize(("prompt", "cached"), [(90, 80), (82, 80), (81, 80), (80, 64), (16, 0)])
def test_a_scored_sequence_reads_what_ends_before_its_first_score(found, way, prompt, cached):
    """The log-probs of the first response token stand at position `prompt` - 1, which must be computed."""
    _, params = vllm_scoring.request([7] * prompt, [8] * (100 - prompt), way, 2)
    assert found(params) == cached


def test_other_requests_read_all_they_find_or_nothing(found):
    assert found(sampling_params(max_tokens=4, skip_reading_prefix_cache=False)) == 96
    assert found(sampling_params(max_tokens=1, prompt_logprobs=1, skip_reading_prefix_cache=False)) == 0  # from the first on
    assert found(vllm_scoring.asking([7] * 90, [8] * 10, [[8, 8]] * 10, "response")[1]) == 0
