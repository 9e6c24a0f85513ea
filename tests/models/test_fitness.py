"""A model is judged before anything starts, from its configuration, its tokenizer and its modules without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families.models import FAMILIES
from test_layers import settings
from transformers import AutoConfig

from pipeline.config import Model, Run
from pipeline.errors import ModelError
from pipeline.models import fitness, head_form
from pipeline.models.blueprint import blueprint
from pipeline.models.stops import stop_ids
from pipeline.models.warmstart import build_tokenizer
from pipeline.overrides import resolve
from pipeline.recipes import demo

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


def run_of(folder: Path, made: Any, *sets: str) -> Run:
    """The demo with a model of which configuration and tokenizer are there, and no weights."""
    made.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return resolve(demo(), [f"model.path={folder}", *sets])


def test_the_model_that_ships_is_known_to_do() -> None:
    assert fitness.check(demo(), on_gpu=False) == []
    with pytest.raises(ModelError, match="the model's window is 256 tokens"):
        fitness.check(resolve(demo(), ["model.max_model_len=300"]), on_gpu=False)


@pytest.mark.parametrize(
    ("window", "refused"), [(199, None), (200, "from 200 tokens on.*to 199 or less"), (300, "window is 256 tokens")]
)
def test_scaled_positions_are_refused_where_they_depend_on_the_batch(window: int, refused: str | None) -> None:
    made = settings("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    made.max_position_embeddings = 256  # type: ignore[attr-defined]
    made.rope_parameters["original_max_position_embeddings"] = 200  # type: ignore[attr-defined]
    model = Model(max_model_len=window)
    if refused is None:
        fitness.check_window(model, made)
    else:
        with pytest.raises(ModelError, match=refused):
            fitness.check_window(model, made)


def test_the_window_of_a_nested_configuration_counts() -> None:
    made = AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 256})
    with pytest.raises(ModelError, match="window is 256 tokens"):
        fitness.check_window(Model(max_model_len=300), made)


def test_a_mixture_of_experts_needs_a_gpu(tmp_path: Path) -> None:
    kind = AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, num_hidden_layers=1, vocab_size=64, num_experts=4, num_attention_heads=2, head_dim=32
    )
    run = run_of(tmp_path, kind, "model.lora_targets=[q_proj]")
    with pytest.raises(ModelError, match=r"mixture of experts.*Use a dense model, or engines on GPUs"):
        fitness.check(run, on_gpu=False)
    assert "not k_proj, v_proj, o_proj" in fitness.check(run, on_gpu=True)[0]


def test_a_trace_ends_where_tokenizer_or_model_say_so_and_somebody_must(tmp_path: Path) -> None:
    run = run_of(tmp_path, settings("llama", eos_token_id=[7, 9]))
    assert stop_ids(run.model, settings("llama", eos_token_id=[7, 9])) == [2, 7, 9]
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    mute = tmp_path / "mute"
    tokenizer.save_pretrained(mute)
    with pytest.raises(ModelError, match="all traces would be cut off"):
        stop_ids(Model(path=str(mute)), settings("llama", eos_token_id=None))


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere", "minicpm3", "falcon_h1", "llama", "opt"])
def test_the_form_of_the_head_is_that_of_the_model_s_code(kind: str) -> None:
    made = settings(kind)
    form = head_form.form_of(made)
    assert (form == head_form.Form()) == (kind in ("llama", "opt"))
    assert head_form.gap(blueprint(Model(), made), form) < 1e-5
    assert head_form.gap(blueprint(Model(), made), head_form.Form(form.scale * 1.1, form.cap)) > 1e-3


def test_a_head_of_another_form_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, settings("gemma2"))
    monkeypatch.setattr(head_form, "form_of", lambda _: head_form.Form())
    with pytest.raises(ModelError, match="does something unknown to its logits"):
        fitness.check(run, on_gpu=False)


@pytest.mark.parametrize("kind", ["gpt2", "stablelm"])
def test_a_model_whose_adapters_engines_do_not_serve_is_refused_and_trains_whole(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ModelError, match=r"vLLM serves no adapters for .*Set model.tuning=full"):
        fitness.check(run_of(tmp_path, settings(kind), "model.lora_targets=all-linear"), on_gpu=False)
    assert fitness.check(run_of(tmp_path, settings(kind), "model.tuning=full"), on_gpu=False) == []


def test_a_window_that_has_another_length_in_engines_is_refused_beyond_it(tmp_path: Path) -> None:
    """vLLM's sliding window of Cohere 2 has one token more: .03 nat on average, .76 at most, with a window of 16."""
    made = settings("cohere2", sliding_window=100)
    with pytest.raises(ModelError, match=r"one token more than that of transformers, 100.*to 100 or less"):
        fitness.check(run_of(tmp_path, made, "model.max_model_len=101"), on_gpu=False)
    assert fitness.check(run_of(tmp_path, made, "model.max_model_len=100"), on_gpu=False) == []


def test_an_activation_that_engines_compute_in_bfloat16_is_refused_in_float32(tmp_path: Path) -> None:
    made, targets = settings("apertus"), "model.lora_targets=[q_proj]"
    with pytest.raises(ModelError, match="differ by 4e-4 nat on average"):
        fitness.check(run_of(tmp_path, made, targets), on_gpu=False)
    for accepted in ("model.dtype=bfloat16", "train.logprob_gap=1e-3"):
        fitness.check(run_of(tmp_path, made, targets, accepted), on_gpu=False)


def test_every_family_is_one_that_transformers_builds() -> None:
    assert len(FAMILIES) >= 25
    assert torch.get_default_device() == torch.device("cpu")
