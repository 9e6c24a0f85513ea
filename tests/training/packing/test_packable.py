"""A model that mixes tokens outside of attention is found out, and then its micro-batches are padded or its run is refused."""

from __future__ import annotations

import pytest
import torch
from test_attention import FAMILIES, MIXED, model
from training_rounds import tiny_run

from pipeline.errors import ModelError, SettingError
from pipeline.training.packing import packable

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "Lfm2", "Mamba2", "Bloom"])
def test_packing_is_taken_where_it_is_right(family: str, dtype: str) -> None:
    student = model(family)
    student.model.get_base_model().to(getattr(torch, dtype))
    run = tiny_run(f"train.dtype={dtype}")
    before = student.model.get_base_model().config._attn_implementation
    assert packable.prepare(student, run, CPU) == (family in FAMILIES)
    if family in MIXED:
        assert student.model.get_base_model().config._attn_implementation == before
        with pytest.raises(ModelError, match=r"cannot run packed micro-batches: .* Set train\.packing padded, or auto"):
            packable.prepare(student, tiny_run(f"train.dtype={dtype}", "train.packing=packed"), CPU)


def test_packing_is_not_tried_where_it_is_not_asked_for() -> None:
    student = model("Llama")
    assert not packable.prepare(student, tiny_run("train.packing=padded"), CPU)
    assert not packable.prepare(student, tiny_run("model.lora_dropout=0.1"), CPU)
    with pytest.raises(SettingError, match="packed would drop one choice of features for all traces of a prompt"):
        tiny_run("model.lora_dropout=0.1", "train.packing=packed")
