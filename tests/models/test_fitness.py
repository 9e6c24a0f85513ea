"""A model is judged before anything starts, from its configuration, its tokenizer and its modules without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families.models import COMMON, FAMILIES, WHOLE
from test_layers import settings
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.config import Model, Run
from pipeline.errors import ModelError, SettingError
from pipeline.models import fitness, head_form
from pipeline.models.blueprint import blueprint
from pipeline.models.layers import with_targets
from pipeline.models.stops import stop_ids
from pipeline.models.warmstart import build_tokenizer
from pipeline.overrides import resolve
from pipeline.recipes import demo

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


def run_of(folder: Path, made: Any, *sets: str) -> Run:
    """The demo with a model of which configuration and tokenizer are there, and no weights."""
    made.architectures = made.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[made.model_type]]  # as a saved model has it
    made.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return resolve(demo(), [f"model.path={folder}", *sets])


def test_the_model_that_ships_is_known_to_do() -> None:
    assert fitness.check(demo(), for_gpus=False) == []
    with pytest.raises(ModelError, match="the model's window is 256 tokens"):
        fitness.check(resolve(demo(), ["model.max_model_len=300"]), for_gpus=False)


@pytest.mark.parametrize("teacher", [False, True])
def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path, teacher: bool) -> None:
    """Transformers added it, engines did not, and the trainer's own adapter then took its place without a word."""
    run = run_of(tmp_path, settings("llama"), "train.logprob_gap=1")
    run = resolve(demo(), [f"teachers.big.model={tmp_path}"]) if teacher else run
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter \(adapter_config\.json\).*merge_and_unload"):
        fitness.check(run, for_gpus=False)


@pytest.mark.parametrize("scaled", [LONGROPE, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}])
@pytest.mark.parametrize(
    ("window", "refused"), [(199, None), (200, "from 200 tokens on.*to 199 or less"), (300, "window is 256 tokens")]
)
def test_scaled_positions_are_refused_where_they_depend_on_the_batch(
    scaled: dict[str, Any], window: int, refused: str | None
) -> None:
    made = settings("llama", rope_parameters=dict(scaled))
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
        fitness.check(run, for_gpus=False)
    assert "not k_proj, v_proj, o_proj" in fitness.check(run, for_gpus=True)[0]


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
        fitness.check(run, for_gpus=False)


@pytest.mark.parametrize("kind", ["gpt2", "stablelm"])
def test_a_model_whose_adapters_engines_do_not_serve_is_refused_and_trains_whole(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ModelError, match=r"vLLM serves no adapters for .*Set model.tuning=full"):
        fitness.check(run_of(tmp_path, settings(kind), "model.lora_targets=all-linear"), for_gpus=False)
    assert fitness.check(run_of(tmp_path, settings(kind), "model.tuning=full"), for_gpus=False) == []


def test_a_window_that_has_another_length_in_engines_is_refused_beyond_it(tmp_path: Path) -> None:
    """vLLM's sliding window of Cohere 2 has one token more: .03 nat on average, .76 at most, with a window of 16."""
    made = settings("cohere2", sliding_window=100)
    with pytest.raises(ModelError, match=r"one token more than that of transformers, 100.*to 100 or less"):
        fitness.check(run_of(tmp_path, made, "model.max_model_len=101"), for_gpus=False)
    assert fitness.check(run_of(tmp_path, made, "model.max_model_len=100"), for_gpus=False)


def test_an_activation_that_engines_compute_in_bfloat16_is_refused_in_float32(tmp_path: Path) -> None:
    made, targets = settings("apertus"), "model.lora_targets=[q_proj]"
    with pytest.raises(ModelError, match="differ by 4e-4 nat on average"):
        fitness.check(run_of(tmp_path, made, targets), for_gpus=False)
    for accepted in ("model.dtype=bfloat16", "train.logprob_gap=1e-3"):
        fitness.check(run_of(tmp_path, made, targets, accepted), for_gpus=False)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("ernie4_5", {"use_bias": True}, r"has biases \(use_bias\), which vLLM does not load"),
        (
            "deepseek_v3",
            {"num_hidden_layers": 2, "first_k_dense_replace": 2},
            "family deepseek_v3, which vLLM's build for CPUs computes wrongly",
        ),
        ("mamba2", {}, "family mamba2, which vLLM's build for CPUs"),
    ],
)
def test_a_family_that_engines_compute_wrongly_is_refused_also_as_a_teacher(
    tmp_path: Path, kind: str, more: dict[str, Any], message: str
) -> None:
    made = AutoConfig.for_model(kind, **more)
    made.max_position_embeddings = 256
    run = run_of(tmp_path, made, "model.tuning=full")
    with pytest.raises(ModelError, match=message):
        fitness.check(run, for_gpus=False)
    teacher = resolve(demo(), [f"teachers.big.model={tmp_path}"])
    with pytest.raises(ModelError, match=message):
        fitness.check(teacher, for_gpus=False)
    fitness.check(resolve(teacher, ["teachers.big.server=http://localhost:1"]), for_gpus=False)  # not ours to look at


def test_a_mixture_with_all_weights_is_refused_on_a_cpu_for_its_own_reason(tmp_path: Path) -> None:
    made = AutoConfig.for_model("qwen3_moe", hidden_size=64, num_hidden_layers=1, vocab_size=64, num_experts=4)
    with pytest.raises(ModelError, match="never seen to reload all weights"):
        fitness.check(run_of(tmp_path, made, "model.tuning=full"), for_gpus=False)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
@pytest.mark.parametrize("teacher", [False, True])
def test_a_model_that_also_reads_images_is_refused_wherever_it_is_installed(tmp_path: Path, kind: str, teacher: bool) -> None:
    """It was refused only without torchvision, which vLLM's build for GPUs brings: engines then failed, after minutes.

    vLLM's own processor for such models refuses to start without a tokenizer, and engines here have none.
    """
    made = AutoConfig.for_model(kind, text_config={"max_position_embeddings": 256})
    run = run_of(tmp_path, made)
    run = resolve(demo(), [f"teachers.big.model={tmp_path}"]) if teacher else run
    with pytest.raises(ModelError, match=r"also reads vision, and engines here read token ids only.*Take the text part"):
        fitness.check(run, for_gpus=True)


def test_the_text_part_of_a_model_that_reads_images_is_taken(tmp_path: Path) -> None:
    hybrid = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    for kind, own in (("gemma3_text", {}), ("qwen3_5_text", hybrid)):
        made = AutoConfig.for_model(kind, **{**COMMON, **own})
        assert fitness.check(run_of(tmp_path / kind, made, "model.lora_targets=[down_proj]"), for_gpus=True)


def test_which_layers_are_trained_is_always_said(tmp_path: Path) -> None:
    """It was not where all usual names are there, nor with all-linear where no layer is left."""
    [note] = fitness.check(run_of(tmp_path, settings("llama")), for_gpus=False)
    assert "LoRA trains 14 linear layers: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; these are all" in note


def test_a_family_that_cannot_be_used_here_is_not_told_to_train_whole(tmp_path: Path) -> None:
    made = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=64, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"vLLM's build for CPUs computes wrongly.*Use another model, or engines on GPUs"):
        fitness.check(run_of(tmp_path, made), for_gpus=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "sixty"}, "configuration cannot be loaded.*hidden_size"),
        ({"layer_types": ["full_attention"], "model_type": "qwen3"}, "configuration cannot be loaded.*layer"),
    ],
)
def test_a_configuration_that_is_malformed_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run = run_of(tmp_path, settings("llama"))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message) as raised:
        fitness.check(run, for_gpus=False)
    assert "\n" not in str(raised.value)


def test_an_end_of_traces_that_is_no_id_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, settings("llama"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ModelError, match=r"eos_token_id: '</s>' is no number of a token.*generation_config\.json"):
        stop_ids(run.model, settings("llama"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantised .gptq.*without quantisation"),
        ({"vocab_size": 40}, "the tokenizer has ids up to 56, and the model has 40 tokens"),
        ({"num_attention_heads": 0}, "no causal language model|no model here"),
        ({"num_key_value_heads": 0}, "no causal language model|no model here"),
    ],
)
def test_what_no_run_can_use_is_refused_in_one_line_also_as_a_teacher(tmp_path, change, message) -> None:
    run = run_of(tmp_path, settings("llama"))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        fitness.check(run, for_gpus=False)
    teaches = resolve(demo(), [f"teachers.big.model={tmp_path}"])
    if "quantised" in message:
        fitness.check(teaches, for_gpus=False)
        return
    with pytest.raises(ModelError, match=message):
        fitness.check(teaches, for_gpus=False)


def test_float16_does_not_train_and_is_said_before_anything_starts() -> None:
    with pytest.raises(SettingError, match="float16 gradients underflow"):
        fitness.check(resolve(demo(), ["train.dtype=float16"]), for_gpus=False)


@pytest.mark.parametrize("eos", [9999, -1, [9999, -1]])
def test_an_end_of_traces_that_the_model_cannot_write_does_not_count(tmp_path: Path, eos: Any) -> None:
    run = run_of(tmp_path, settings("llama"))
    for name, change in (("config.json", {"eos_token_id": eos}), ("tokenizer_config.json", {"eos_token": None})):
        file = tmp_path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=r"no token that ends a trace .* is one of the model's \d+: all traces would be cut off"):
        fitness.check(run, for_gpus=False)


@pytest.mark.parametrize("text", ['{"max_new_tokens": 0}', "[]", '"x"', '{"watermarking_config": "x"}', '{"eos_token_id": [1'])
def test_a_generation_configuration_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    run = run_of(tmp_path, settings("llama"))
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"generation_config.json cannot be read.*Correct the file, or remove it"):
        fitness.check(run, for_gpus=False)


def test_the_window_is_found_under_its_other_names() -> None:
    made = AutoConfig.for_model("mpt", max_seq_len=64)
    with pytest.raises(ModelError, match="window is 64 tokens"):
        fitness.check_window(Model(max_model_len=128), made)


def test_a_model_that_lacks_a_package_says_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError("This model requires the timm library")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lacking)
    with pytest.raises(ModelError, match=r"requires the timm library.*Install the package"):
        blueprint(Model(), settings("llama"))


def test_every_family_is_one_that_transformers_builds() -> None:
    assert len(FAMILIES) >= 25
    assert torch.get_default_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("RWKV", "vLLM has no class for RwkvForCausalLM, and cannot run that of transformers"),
        ("GPT-Neo", "vLLM has no class for GPTNeoForCausalLM"),
        ("Doge", "vLLM has no class for DogeForCausalLM"),
        ("BERT as decoder", "has something between its decoder and its output layer"),
        ("ModernBERT decoder", "has no decoder and output layer that can be taken apart"),
    ],
)
def test_a_class_that_engines_or_the_trainers_head_cannot_use_is_refused(tmp_path: Path, family: str, message: str) -> None:
    kind, own = FAMILIES[family]
    run = run_of(tmp_path, AutoConfig.for_model(kind, **{**COMMON, **own}), "model.lora_targets=all-linear")
    with pytest.raises(ModelError, match=message):
        fitness.check(run, for_gpus=False)


@pytest.mark.parametrize("family", ["GPT-2", "Helium", "BitNet", "StableLM"])
def test_a_class_of_transformers_and_one_with_an_answer_of_its_own_kind_are_taken(tmp_path: Path, family: str) -> None:
    """vLLM runs Helium's by transformers. GPT-2 reads cross attentions of its decoder's answer, which a stand-in must have."""
    kind, own = FAMILIES[family]
    sets = ["model.tuning=full"] if family in WHOLE else ["model.lora_targets=all-linear"]
    run = run_of(tmp_path, AutoConfig.for_model(kind, **{**COMMON, **own}), *sets)
    fitness.check(with_targets(run), for_gpus=False)


def test_a_missing_architecture_is_what_vllm_takes_it_for(tmp_path: Path) -> None:
    """vLLM takes a Llama for `LlamaModel`, which it knows as a language model, and a Qwen 3 for one of embeddings."""
    for kind in ("llama", "qwen3"):
        run = run_of(tmp_path / kind, AutoConfig.for_model(kind, **COMMON))
        settings = json.loads((tmp_path / kind / "config.json").read_text())
        del settings["architectures"]
        (tmp_path / kind / "config.json").write_text(json.dumps(settings))
        if kind == "llama":
            fitness.check(run, for_gpus=False)
            continue
        with pytest.raises(ModelError, match="names no architecture"):
            fitness.check(run, for_gpus=False)
