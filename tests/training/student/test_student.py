"""The student as it is built: what a verb that builds one shows on the screen."""

from __future__ import annotations

import pytest
import torch
from families.models import COMMON, FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.utils import logging

from pipeline.models.resolve import asset_path
from pipeline.models.warmstart import build_tokenizer
from pipeline.overrides import resolve
from pipeline.recipes import demo
from pipeline.training.student import student


def test_loading_a_model_draws_no_bar(capfd):
    """`egrsd sweep` builds a student in its own process, and transformers drew `Loading weights: 100%` on the screen."""
    logging.enable_progress_bar()
    student.build(demo(), torch.device("cpu"))
    assert capfd.readouterr().err == ""


def test_weights_of_a_layer_are_the_bases_whatever_is_trained_just_now():
    """Layers and last norm over the number of layers. The audit lets the base's weights have gradients, and the adapter's not."""
    plain = AutoModelForCausalLM.from_pretrained(asset_path()).model
    inside = sum(weight.numel() for part in (plain.layers, plain.norm) for weight in part.parameters())
    built = student.build(demo(), torch.device("cpu"))
    assert built.layer_weights == inside / len(plain.layers) == 196_960
    for name, weight in built.model.named_parameters():
        weight.requires_grad_("lora_" not in name)
    assert built.layer_weights == 196_960


@pytest.mark.parametrize(
    ("family", "code", "target"),
    [("Falcon-H1", modeling_falcon_h1, "in_proj"), ("Granite 4 hybrid", modeling_granitemoehybrid, "out_proj")],
)  # peft itself refuses out_proj of Falcon-H1, and not of Granite
def test_an_adapter_behind_a_fused_kernel_is_not_passed_by(tmp_path, monkeypatch, family, code, target):
    """With mamba_ssm, layers in training call a kernel that multiplies by the weight of out_proj, without its adapter."""
    kind, own = FAMILIES[family]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **own})).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)

    def fused(projected, *_, outproj_weight, **__):
        return projected[..., : outproj_weight.shape[1]] @ outproj_weight.T

    monkeypatch.setattr(code, "mamba2_split_conv1d_scan_combined", fused)
    run = resolve(demo(), [f"model.path={tmp_path}", f"model.lora_targets=[{target}]"])
    built = student.build(run, torch.device("cpu"))  # it was refused, as one that computes otherwise in training
    tokens, places = torch.arange(4, 12)[None], torch.arange(7)
    before = built.states(tokens, places)
    for name, weight in built.model.named_parameters():
        weight.data += 0.3 * ("lora_B" in name)
    assert (built.states(tokens, places) - before).abs().max() > 0.01
