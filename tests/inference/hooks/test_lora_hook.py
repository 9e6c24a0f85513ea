"""The kernels for LoRA against a loop over tokens."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.inference import hooks
from actors.inference.hooks import lora
from actors.inference.startup import EXACT_ENTROPY
from pipeline.errors import EngineError


@settings(max_examples=40, deadline=None)
@given(slots=st.lists(st.integers(-1, 1), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_every_token_gets_the_adapter_of_its_slot_or_none(slots, seed):
    noise = torch.Generator().manual_seed(seed)
    num_tokens, width_in, rank, widths = len(slots), 5, 3, (4, 2, 2)
    x, y = (torch.randn(num_tokens, size, generator=noise) for size in (width_in, sum(widths)))
    a = tuple(torch.randn(2, 1, rank, width_in, generator=noise) for _ in widths)
    b = tuple(torch.randn(2, 1, width, rank, generator=noise) for width in widths)

    expected = y.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            delta = [b[part][slot, 0] @ (a[part][slot, 0] @ x[token]) for part in range(len(widths))]
            expected[token] += 0.5 * torch.cat(delta)

    wrapper, masked = SimpleNamespace(slot_rows=lora.group_by_slot(torch.tensor(slots))), y.clone()
    lora._add_lora_linear(wrapper, y, x, a, b, 0.5, widths, buffer=None)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    lora._add_lora_masked(torch.tensor(slots), masked, x, lora.Loaded(a, b, 0.5, widths))
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=1e-5)


def test_a_step_of_one_slot_indexes_nothing():
    assert lora.group_by_slot(torch.tensor([-1, -1])) == []
    assert lora.group_by_slot(torch.tensor([1, 1, 1])) == [(1, None)]
    [(slot, rows)] = lora.group_by_slot(torch.tensor([0, -1, 0]))
    assert (slot, rows.tolist()) == (0, [0, 2])


def test_the_kernels_stay_as_they_are_in_other_peoples_vllm(monkeypatch):
    """The entry point also runs there, wherever this package is installed."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    monkeypatch.delenv(EXACT_ENTROPY, raising=False)
    before = vars(PunicaWrapperCPU).copy()
    hooks.install()
    assert vars(PunicaWrapperCPU) == before


def test_the_cpu_kernels_are_replaced_once_and_a_vllm_without_them_is_refused(shipped, hooked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("update_metadata", "add_lora_linear"):
        wrapper = shipped(lora._CPU, name)
    for name in ("update_metadata", "add_lora_linear"):
        hooked(wrapper, name, lambda: lora.install() is None)
    assert wrapper.add_lora_linear is lora._add_lora_linear
    monkeypatch.setattr(lora, "_CPU", "vllm.lora.punica_wrapper.punica_cpu:Other")
    with pytest.raises(EngineError, match=r"are not those of 0\.32"):
        lora.install()
