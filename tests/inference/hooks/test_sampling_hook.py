"""Top-k with top-p on a CPU keeps the tokens that vLLM's sort of the whole vocabulary keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.inference.hooks import sampling


@pytest.fixture
def module(shipped, hooked):
    """vLLM's module that applies top-k and top-p, with the change."""
    plain = shipped("vllm.v1.sample.ops.topk_topp_sampler", "apply_top_k_top_p")
    return hooked(plain, "apply_top_k_top_p", sampling.install)


def test_the_kept_tokens_by_hand():
    """Masses .4, .3, .2, .1: of the 3 most likely, .3 / .9 and .4 / .9 are kept at p = .75, since .2 / .9 is below .25."""
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3, 1e-9]]).log()
    assert sampling.least_kept(logits, torch.tensor([3]), torch.tensor([0.75])).exp().tolist() == pytest.approx([0.3])
    assert sampling.least_kept(logits, torch.tensor([3]), torch.tensor([0.8])).exp().tolist() == pytest.approx([0.2])
    assert sampling.least_kept(logits, torch.tensor([1]), torch.tensor([0.1])).exp().tolist() == pytest.approx([0.4])


@given(
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(1, 60), st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.95, 1.0])), min_size=1, max_size=5),
    st.sampled_from([0.2, 2.0, 8.0]),
)
def test_the_same_tokens_are_left_as_by_a_whole_sort(seed, rows, spread):
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    logits = torch.randn(len(rows), 64, generator=torch.Generator().manual_seed(seed)) * spread
    k, p = torch.tensor([k for k, _ in rows], dtype=torch.int32), torch.tensor([p for _, p in rows])
    least = sampling.least_kept(logits, k.long(), p)
    expected = apply_top_k_top_p_pytorch(logits.clone(), k, p, allow_cpu_sync=True)
    assert not least.isnan().any()
    assert torch.equal(logits.masked_fill(logits < least[:, None], -torch.inf), expected)


def test_ties_at_an_edge_and_large_k_are_left_to_vllm(module):
    tied = torch.tensor([3.0, 2.0, 2.0, 1.0, 0.0]).repeat(4, 1)
    k, p = torch.tensor([2, 5, 5, 1], dtype=torch.int32), torch.tensor([0.9, 0.9, 1.0, 0.9])
    least = sampling.least_kept(tied, k.long(), p)
    assert least.isnan().tolist() == [True, True, False, False]  # 5 is the whole vocabulary: vLLM's word for no top-k
    assert least[2:].tolist() == [-torch.inf, 3.0]
    expected = module.apply_top_k_top_p.__wrapped__(tied.clone(), k, p)
    assert torch.equal(module.apply_top_k_top_p(tied.clone(), k, p), expected)
    assert torch.equal(module.apply_top_k_top_p(tied.clone(), None, None), tied)


def test_no_top_k_of_a_padded_vocabulary_is_none_of_its_first_part_either(module):
    """A teacher shares 4 of 8 ids. vLLM's mark of "no top-k" stayed 8, and `topk(8)` of 4 logits ended the engine."""
    logits, k = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 2), torch.tensor([8, 2], dtype=torch.int32)
    found = module.apply_top_k_top_p(logits.clone(), k, None)
    assert found.isinf().tolist() == [[False] * 4, [False, False, True, True]]


def test_an_edge_of_p_between_equal_logits_is_left_to_vllm():
    """Four equal tokens of .25: with p = .6 a sort keeps three of them, and no logit tells which."""
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0, -9.0, -9.5]])
    assert sampling.least_kept(logits, torch.tensor([4]), torch.tensor([0.6])).isnan().all()
