"""The student as it is built: what a verb that builds one shows on the screen."""

from __future__ import annotations

import torch
from transformers.utils import logging

from pipeline.recipes import demo
from pipeline.training.student import student


def test_loading_a_model_draws_no_bar(capfd):
    """`egrsd sweep` builds a student in its own process, and transformers drew `Loading weights: 100%` on the screen."""
    logging.enable_progress_bar()
    student.build(demo(), torch.device("cpu"))
    assert capfd.readouterr().err == ""
