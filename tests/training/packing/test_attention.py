"""Packed attention: every family computes a stream with shared prompts as it computes each trace alone, gradients too."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from packed_round import shared_traces
from torch import Tensor

from pipeline.training import batches
from pipeline.training.batches import Traces
from pipeline.training.packing import attention
from pipeline.training.student.student import Student

SIZE = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = SIZE | {"num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0}
HEADS, WINDOW = {"head_dim": 16}, {"sliding_window": 6}
FAMILIES = {
    "Llama": GROUPED,
    "Qwen3": GROUPED | HEADS,
    "Mistral": GROUPED | WINDOW,
    "Gemma2": GROUPED | HEADS | WINDOW,
    "Gemma3Text": GROUPED | HEADS | WINDOW,
    "Cohere2": GROUPED | WINDOW,
    "Exaone4": GROUPED | WINDOW | {"sliding_window_pattern": 2},
    "GPTNeoX": SIZE,
    "OPT": {"vocab_size": 97, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.0}
    | {"word_embed_proj_dim": 64},
    "GptOss": GROUPED | HEADS | WINDOW | {"num_local_experts": 4},
    "Qwen3Moe": GROUPED | HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
MIXED = {  # layers that mix tokens outside of attention, or positions that no argument gives
    "Mamba2": {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16}
    | {"n_groups": 1},
    "Lfm2": GROUPED | {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "Bloom": {"vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Mpt": {"vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 4},
}
SINGLE = ("GptOss", "Qwen3Moe")  # their experts know no float64


def model(family: str, implementation: str | None = None) -> Student:
    """A student without an adapter. Weights are enlarged, so that attention decides what comes out."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(FAMILIES | MIXED)[family])
    more = {"attn_implementation": implementation} if implementation else {}
    base = transformers.AutoModelForCausalLM.from_config(config, **more).requires_grad_(False).eval()
    with torch.no_grad():
        for weight in base.parameters():
            weight.mul_(3.0 if weight.ndim > 1 else 1.0)
    base = base.float() if family in SINGLE else base.double()
    base.get_input_embeddings().weight.requires_grad_(True)
    student = Student.__new__(Student)
    torch.nn.Module.__init__(student)
    object.__setattr__(student, "model", SimpleNamespace(get_base_model=lambda: base))
    student.trains_all = False
    return student


def states(student: Student, traces: Traces, packed: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Hidden states of every trace, and the gradient of a random projection of them by the embeddings."""
    base, found = student.model.get_base_model(), {}
    for micro in batches.share(traces, np.arange(len(traces.trace_ids)), 0, 1, 90, packed):
        hidden = student.states(micro.tokens, micro.sources, micro.layout)
        found |= dict(zip(micro.trace_ids, hidden.split(micro.mask.sum(1).tolist()), strict=True))
    weight = base.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(1)
    total = sum((found[name] * torch.randn(found[name].shape, generator=generator)).sum() for name in sorted(found))
    (gradient,) = torch.autograd.grad(total, weight)
    return {name: hidden.detach() for name, hidden in found.items()}, gradient


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_stream_has_the_values_and_gradients_of_padded_traces(family: str, implementation: str | None) -> None:
    student, traces = model(family, implementation), shared_traces()
    alone, gradient = states(student, traces, packed=False)
    assert attention.install(student.model.get_base_model()) == ""
    again, same = states(student, traces, packed=False)
    assert all(torch.equal(alone[name], again[name]) for name in alone)  # padded passes keep their bits
    assert torch.equal(gradient, same)
    packed, exact = states(student, traces, packed=True)
    assert packed.keys() == alone.keys()
    for name in alone:  # rotary angles and norms are float32 in some families, whatever the weights are
        torch.testing.assert_close(packed[name], alone[name], atol=1e-4, rtol=1e-4)
    assert float((exact - gradient).norm() / gradient.norm()) < 1e-5
    attention.uninstall(student.model.get_base_model())
    assert torch.equal(states(student, traces, packed=False)[1], gradient)


def test_a_window_matters_here() -> None:
    """Without the model's own masks for each block, the windows of 6 would not hold: prompts and responses are longer."""
    student, traces = model("Mistral"), shared_traces()
    alone, _ = states(student, traces, packed=False)
    base = student.model.get_base_model()
    base.config.sliding_window = None
    wide, _ = states(student, traces, packed=False)
    assert max(float((alone[name] - wide[name]).abs().max()) for name in alone) > 1e-2


def test_gradient_checkpointing_computes_a_stream_again_with_the_same_masks() -> None:
    student, traces = model("Gemma3Text"), shared_traces()
    base = student.model.get_base_model()
    assert attention.install(base) == ""
    _, plain = states(student, traces, packed=True)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.train()
    _, again = states(student, traces, packed=True)
    torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("family", ["Bloom", "Mpt"])
def test_a_model_with_an_attention_of_its_own_is_refused(family: str) -> None:
    base = model(family).model.get_base_model()
    before = base.config._attn_implementation
    assert attention.install(base) == "its attention is not a function that transformers lets one replace"
    assert base.config._attn_implementation == before
