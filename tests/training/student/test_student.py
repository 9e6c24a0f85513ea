"""The student as it is built: what a verb that builds one shows on the screen."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from pipeline.models.resolve import asset_path
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
