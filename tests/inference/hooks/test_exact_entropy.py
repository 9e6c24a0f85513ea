"""The entropy hook: the gate that keeps it out of other people's vLLM, both samplers."""

import importlib
import math

import pytest
import torch

from actors.inference.hooks import exact_entropy
from actors.inference.startup import EXACT_ENTROPY
from pipeline.errors import EngineError


def reference(logprobs):
    """-sum p log p in double precision, token by token."""
    rows = [[-math.exp(x) * x if x > -math.inf else 0.0 for x in row] for row in logprobs.double().tolist()]
    return torch.tensor([math.fsum(row) for row in rows], dtype=torch.float32)


@pytest.fixture
def sampler(shipped):
    """vLLM's V1 sampler as it ships."""
    return shipped("vllm.v1.sample.sampler:Sampler", "gather_logprobs")


def test_without_the_marker_nothing_is_touched(sampler, monkeypatch):
    """The entry point also runs in other people's vLLM, wherever this package is installed."""
    monkeypatch.delenv(EXACT_ENTROPY, raising=False)
    before = sampler.gather_logprobs
    assert exact_entropy.install() is False
    assert sampler.gather_logprobs is before


def test_the_hook_of_another_copy_of_this_project_is_refused(sampler, monkeypatch):
    monkeypatch.setenv(EXACT_ENTROPY, "1")
    exact_entropy.check_origin()
    exact_entropy.install()
    exact_entropy.check_origin()
    other = {"__file__": "/rival/actors/inference/hooks/exact_entropy.py"}
    exec("def gather_logprobs(*_): ...\ngather_logprobs.exact_entropy = True", other)
    monkeypatch.setattr(sampler, "gather_logprobs", staticmethod(other["gather_logprobs"]))
    with pytest.raises(EngineError, match=r"hook of another copy: /rival/actors/inference/hooks/exact_entropy\.py"):
        exact_entropy.check_origin()


def test_the_hook_writes_entropy_in_the_last_column_only(sampler, hooked, monkeypatch):
    logprobs = torch.randn(9, 57, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    ids = torch.arange(9)
    plain = {k: sampler.gather_logprobs(logprobs.clone(), k, ids) for k in (0, 1, 5)}
    monkeypatch.setenv(EXACT_ENTROPY, "1")
    hook = hooked(sampler, "gather_logprobs", exact_entropy.install).gather_logprobs
    assert torch.equal(hook(logprobs, 0, ids).logprobs, plain[0].logprobs)
    for k in (1, 5):
        got = hook(logprobs, k, ids)
        assert got.logprobs.shape == got.logprob_token_ids.shape == (9, k + 1)
        assert torch.equal(got.logprobs[:, :k], plain[k].logprobs[:, :k])
        assert torch.equal(got.logprob_token_ids[:, 0], plain[k].logprob_token_ids[:, 0])
        torch.testing.assert_close(got.logprobs[:, -1], reference(logprobs), atol=2e-6, rtol=2e-6)


def test_the_gpu_runners_function_is_where_the_hook_looks_for_it():
    """The V2 runner needs Triton to run; that its names are still there can be said anywhere."""
    for name in exact_entropy._V2_MODULES:
        assert callable(importlib.import_module(name).compute_topk_scores), name
    assert callable(importlib.import_module(exact_entropy._V2_NAMED_IDS).compute_token_logprobs)


def test_the_gpu_runners_hook_computes_from_logits():
    from vllm.v1.outputs import LogprobsTensors

    def compute_topk_scores(logits, num_logprobs, sampled_token_ids, cu_num_logits=None, **_):
        """vLLM's, without its Triton kernels."""
        best = logits.topk(num_logprobs).indices if num_logprobs else sampled_token_ids[:, None][:, :0]
        ids = torch.cat((sampled_token_ids[:, None], best), 1)
        return LogprobsTensors(ids, logits.float().log_softmax(-1).gather(1, ids), torch.zeros(len(logits)), cu_num_logits)

    hook = exact_entropy.topk_scores_hook(compute_topk_scores)
    logits, ids = torch.randn(6, 1000).bfloat16() * 3, torch.arange(6)
    for k in (0, 1, 4, 1001):
        plain, got = compute_topk_scores(logits, min(k, 1000), ids), hook(logits, k, ids)
        assert got.logprobs.shape == got.logprob_token_ids.shape == (6, k + 1)
        assert torch.equal(got.logprob_token_ids[:, : max(k, 1)], plain.logprob_token_ids[:, : max(k, 1)])
        assert torch.equal(got.logprobs[:, : max(k, 1)], plain.logprobs[:, : max(k, 1)])
        if k:
            expected = reference(logits.float().log_softmax(-1))
            torch.testing.assert_close(got.logprobs[:, -1], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(hook(logits, 4, ids, logits_mode=True).logprobs, compute_topk_scores(logits, 4, ids).logprobs)


def test_the_hook_for_named_ids_writes_entropy_over_the_last_of_several():
    def compute_token_logprobs(logits, token_ids):
        return logits.float().log_softmax(-1).gather(1, token_ids)

    hook = exact_entropy.token_logprobs_hook(compute_token_logprobs)
    logits, ids = torch.randn(6, 1000).bfloat16() * 3, torch.arange(6)[:, None]
    assert torch.equal(hook(logits, ids), compute_token_logprobs(logits, ids))
    got = hook(logits, ids.repeat(1, 2))
    assert torch.equal(got[:, :1], compute_token_logprobs(logits, ids))
    torch.testing.assert_close(got[:, 1], reference(logits.float().log_softmax(-1)), atol=1e-5, rtol=1e-5)


def test_the_hook_for_named_ids_gives_the_likeliest_where_a_row_names_one_token():
    def compute_token_logprobs(logits, token_ids):
        return logits.float().log_softmax(-1).gather(1, token_ids)

    hook = exact_entropy.token_logprobs_hook(compute_token_logprobs)
    logits, token = torch.randn(6, 1000) * 3, torch.arange(6)[:, None]
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(32)
    got = hook(logits, token.repeat(1, 66))
    assert torch.equal(got[:, :1], logprobs.gather(1, token))
    assert torch.equal(got[:, 1:33], best.values)
    assert torch.equal(got[:, 33:65].int(), best.indices.int())
    torch.testing.assert_close(got[:, 65], reference(logprobs), atol=1e-5, rtol=1e-5)
    named = torch.stack([torch.randperm(1000)[:66] for _ in range(6)])
    mixed = hook(logits, torch.cat((token[:3].repeat(1, 66), named[3:])))
    assert torch.equal(mixed[:3], got[:3])
    assert torch.equal(mixed[3:, :65], logprobs.gather(1, named)[3:, :65])


def test_a_server_tells_entropies_under_an_id_that_no_other_column_has():
    logprobs = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for k in (1, 3, 8):
        for token in range(9):
            asked = torch.full((40, 1), token)
            place = exact_entropy._place_of_its_own(logprobs, asked, k)
            others = torch.cat((asked, logprobs.topk(k - 1, dim=-1).indices), 1)
            assert place.shape == (40, 1)
            assert not (place == others).any()
