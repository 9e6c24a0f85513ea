"""Names of LoRA targets against the layers of real model classes, which are built without weights."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from families.models import COMMON, FAMILIES
from transformers import AutoConfig

from pipeline.config import Model, Run
from pipeline.errors import SettingError
from pipeline.models import layers
from pipeline.models.blueprint import blueprint
from pipeline.overrides import resolve
from pipeline.recipes import demo


def settings(kind: str, **changes: object) -> object:
    own = next(own for known, own in FAMILIES.values() if known == kind)
    return AutoConfig.for_model(kind, **{**COMMON, **own, **changes})


def saved(folder: Path, kind: str, *sets: str) -> Run:
    """The demo with a model of some kind, of which only the configuration is there."""
    settings(kind).save_pretrained(folder)
    return resolve(demo(), [f"model.path={folder}", *sets])


def test_default_names_stay_where_the_model_has_them_all(tmp_path: Path) -> None:
    run = saved(tmp_path, "llama")
    assert layers.with_targets(run) is run
    said = layers.check(run.model, blueprint(run.model))
    assert said == "LoRA trains 14 linear layers: " + ", ".join(layers.DEFAULT) + "; these are all but the head"


def test_a_new_run_trains_all_linear_layers_where_a_default_name_is_missing_and_an_old_one_goes_on(tmp_path: Path) -> None:
    run = saved(tmp_path, "phi3")
    names = layers.with_targets(run).model.lora_targets
    assert sorted(names) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert layers.with_targets(run, new=False) is run
    with pytest.raises(SettingError, match=r"no linear layer of .* is named q_proj"):
        layers.check(run.model, blueprint(run.model))
    said = layers.check(run.model, blueprint(run.model), begun=True)
    assert said.startswith("LoRA trains 4 linear layers: o_proj, down_proj; not ")


def test_all_linear_leaves_out_what_engines_cannot_serve(tmp_path: Path) -> None:
    run = layers.with_targets(saved(tmp_path, "minicpm3", "model.lora_targets=all-linear"))
    assert "kv_b_proj" not in run.model.lora_targets
    assert "kv_a_proj_with_mqa" in run.model.lora_targets
    assert "not kv_b_proj (engines fold its weight into attention" in layers.check(run.model, blueprint(run.model))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("[q_proj, lm_head]", "lm_head cannot be trained: the head's log-probs"),
        ("[q_proj, embed_tokens]", "embed_tokens cannot be trained"),
        ("[q_proj, k_prj]", "no linear layer of .* is named k_prj. Did you mean 'k_proj'"),
    ],
)
def test_a_name_that_cannot_be_trained_is_refused(targets: str, said: str, tmp_path: Path) -> None:
    run = saved(tmp_path, "qwen3", f"model.lora_targets={targets}")
    with pytest.raises(SettingError, match=rf"model\.lora_targets: {said}"):
        layers.check(run.model, blueprint(run.model))


def test_experts_are_never_trained() -> None:
    kind = AutoConfig.for_model("qwen3_moe", hidden_size=64, num_hidden_layers=1, vocab_size=64, num_experts=4)
    net = blueprint(Model(), kind)
    assert layers.has_experts(net)
    assert layers.served(net) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert not layers.has_experts(blueprint(Model(), settings("llama")))


def test_what_peft_refuses_is_not_offered() -> None:
    """Falcon-H1 has a Mamba layer beside attention. peft refused `out_proj` after engines and trainer had started."""
    net = blueprint(Model(), settings("falcon_h1"))
    assert "out_proj" in layers.linear(net)
    assert "out_proj" not in layers.served(net)
    with pytest.raises(SettingError, match="out_proj cannot be trained: peft refuses it in models with Mamba layers"):
        layers.check(Model(lora_targets=("out_proj",)), net)
    names = tuple(layers.served(net))
    peft.get_peft_model(net, peft.LoraConfig(target_modules=list(names), task_type="CAUSAL_LM"))
