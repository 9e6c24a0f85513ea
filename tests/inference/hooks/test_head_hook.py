"""The head of a half-precision model on a CPU computes in float32 from one copy of its weight, which a reload drops."""

from types import SimpleNamespace

import pytest
import torch

from actors.inference.hooks import head


@pytest.fixture
def processor(shipped, hooked):
    """vLLM's LogitsProcessor, with the change."""
    plain = shipped("vllm.model_executor.layers.logits_processor:LogitsProcessor", "_apply_head")
    return hooked(plain, "_apply_head", head.install)


def layer(dtype=torch.bfloat16):
    """A head of vLLM without parallel parts: a module with a weight, and vLLM's plain way to apply it."""
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    made = torch.nn.Linear(16, 40, bias=False, dtype=dtype)
    made.quant_method = UnquantizedEmbeddingMethod()
    made.cpu_linear = torch.nn.functional.linear  # vLLM packs the weight here when it loads a model
    return made


def test_logits_are_those_of_vllm_itself_and_the_weight_is_copied_once(processor):
    made, hidden = layer(), torch.randn(6, 16).bfloat16()
    bias = torch.randn(40).bfloat16()
    own = SimpleNamespace(head_dtype=torch.float32)
    for one in (None, bias):
        expected = processor._apply_head.__wrapped__(own, made, hidden, one)
        found = processor._apply_head(own, made, hidden, one)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    copy = made.egrsd_wide
    processor._apply_head(own, made, hidden, None)
    assert made.egrsd_wide is copy
    assert "egrsd_wide" not in made.state_dict()


def test_a_head_in_the_dtype_of_its_model_is_left_to_vllm(processor):
    for dtype, wanted in ((torch.float32, torch.float32), (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16)):
        made, hidden = layer(dtype), torch.randn(6, 16, dtype=dtype)
        processor._apply_head(SimpleNamespace(head_dtype=wanted), made, hidden, None)
        assert "egrsd_wide" not in vars(made)


def test_changed_weights_are_used_after_the_copy_was_dropped(processor):
    made, hidden, own = layer(), torch.randn(6, 16).bfloat16(), SimpleNamespace(head_dtype=torch.float32)
    model = torch.nn.Sequential(made)
    processor._apply_head(own, made, hidden, None)
    with torch.no_grad():
        made.weight.mul_(2)
    head.forget(model)
    expected = processor._apply_head.__wrapped__(own, made, hidden, None)
    assert torch.equal(processor._apply_head(own, made, hidden, None), expected)
