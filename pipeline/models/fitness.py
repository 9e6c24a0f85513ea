"""Can this run train and serve its model, and will both sides compute the same? Everything is asked before anything is paid for.

Weights are not needed: the configuration, the tokenizer and the modules without weights tell it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from pipeline.config import Model, Run
from pipeline.errors import ModelError, SettingError
from pipeline.models import head_form, layers
from pipeline.models.blueprint import blueprint, has_experts, settings_of
from pipeline.models.lora_support import has_class, serves_lora
from pipeline.models.resolve import MODEL_NAME, asset_path, check_folder, hub_answers, resolve_model
from pipeline.models.stops import stop_ids
from pipeline.models.tokenizers.tokenizer import tokenizer_of

LONG = ("longrope", "dynamic")  # ways to scale positions that depend on the length of the whole batch
# Families that vLLM's build for CPUs computes wrongly (dense DeepSeek: 1.9 nat), or ends with an error (Mamba 2, Youtu).
NOT_ON_CPU = (
    *("deepseek_v2", "deepseek_v3", "mamba", "mamba2", "falcon_mamba", "youtu"),
    *("bamba", "deepseek_v32", "glm_moe_dsa", "olmo_hybrid"),  # for these it has no kernel
)
# Families without a class in vLLM, which tries that of transformers in vain.
NOT_THROUGH = ("biogpt", "ctrl", "diffllama", "doge")
IN_BFLOAT16 = ("apertus",)  # families of which vLLM computes a part in bfloat16, whatever model.dtype says
WINDOWS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "max_target_positions")
_SAME = 1e-4  # relative difference of logits


def check(run: Run, for_gpus: bool, begun: bool = False) -> list[str]:
    """What the person who starts the run should know about its model. Raises ModelError or SettingError for one that does not do.

    for_gpus: whether this vLLM is the build for GPUs. Models of teachers are checked too. The model that ships is known to do.
    """
    if run.train.dtype == "float16":
        raise SettingError("float16 gradients underflow without loss scaling", "train.dtype", "Use bfloat16 or float32")
    _check_teachers(run, for_gpus)
    on_gpu = for_gpus or run.engines.rollout.placement.gpus > 0
    if run.model.path == MODEL_NAME and run.model.lora_targets == layers.DEFAULT:
        window = json.loads((asset_path() / "config.json").read_text())["max_position_embeddings"]
        _check_fits(run.model, window)  # without transformers, whose import takes seconds
        return []
    _check_adapter(run.model)
    settings = settings_of(run.model)
    check_window(run.model, settings)
    _check_parts(run.model, settings)
    _check_plain(run.model, settings)
    _check_class(run.model, settings)
    _check_vocabulary(run.model, settings)
    stop_ids(run.model, settings)
    net = blueprint(run.model, settings)
    if has_experts(net) and not on_gpu:
        what = "is a mixture of experts, which vLLM's build for CPUs cannot serve with LoRA (it calls Triton)"
        if run.model.tuning == "full":
            what = "is a mixture of experts, of which vLLM's build for CPUs was never seen to reload all weights"
        raise ModelError(what, run.model.path, "Use a dense model, or engines on GPUs")
    if not _comes_apart(net):
        raise ModelError("has no decoder and output layer that can be taken apart", run.model.path, "Use another model")
    _check_alike(run, run.model, settings, on_gpu)
    if run.model.tuning == "lora" and serves_lora(type(net).__name__) is False:
        what = f"vLLM serves no adapters for {type(net).__name__}"
        raise ModelError(what, run.model.path, "Set model.tuning=full, or use another model")
    _check_head(run.model, net, head_form.form_of(settings))
    if run.model.tuning == "full":
        return []
    return [f"note: {run.model.path}: {layers.check(run.model, net, begun)} (model.lora_targets)"]


def _check_adapter(model: Model) -> None:
    """Raise ModelError for a model with an adapter: transformers adds it, engines do not, and a new one takes its place."""
    from transformers.utils.peft_utils import find_adapter_config_file

    path = resolve_model(model.path)
    check_folder(path)
    with contextlib.suppress(OSError):  # the hub cannot be asked
        if find_adapter_config_file(path, revision=model.revision, local_files_only=not hub_answers()):
            remedy = "Merge it into the weights (egrsd export --merge, peft's merge_and_unload), or take adapter_config.json away"
            raise ModelError("holds an adapter (adapter_config.json), which engines would leave out", model.path, remedy)


def check_window(model: Model, settings: Any) -> None:
    """Raise ModelError when `max_model_len` exceeds the model's window, or the window up to which positions are the same."""
    text = settings.get_text_config()
    _check_fits(model, next((size for name in WINDOWS if isinstance(size := getattr(text, name, None), int)), None))
    for kind, original in _scaled(text):
        if kind in LONG and original and model.max_model_len >= original:  # an engine has room for one token more
            raise ModelError(
                f"positions are scaled by '{kind}' from {original} tokens on, where a trace's log-probs depend on its batch",
                model.path,
                f"Lower model.max_model_len {model.max_model_len} to {original - 1} or less",
            )


def _check_fits(model: Model, window: int | None) -> None:
    if window and model.max_model_len > window:
        raise ModelError(f"the model's window is {window} tokens", model.path, f"Lower model.max_model_len {model.max_model_len}")


def _scaled(text: Any) -> Iterator[tuple[str, int | None]]:
    """(kind, original window) of each way in which a model scales positions. Some models have one for each kind of layer."""
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for one in [found, *found.values()]:
        if isinstance(one, dict) and (kind := one.get("rope_type", one.get("type"))):
            original = one.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
            yield kind, original or getattr(text, "max_position_embeddings", None)


def _check_parts(model: Model, settings: Any) -> None:
    """Raise ModelError for a model that also reads images or sound: vLLM starts none without a tokenizer, as engines here are."""
    if others := [name for name in ("vision_config", "audio_config") if getattr(settings, name, None) is not None]:
        raise ModelError(
            f"also reads {', '.join(name.removesuffix('_config') for name in others)}, and engines here read token ids only",
            model.path,
            "Take the text part of this model, as a folder of its own",
        )


def _check_plain(model: Model, settings: Any) -> None:
    """Raise ModelError for a student with quantised weights: the trainer cannot train them. A teacher may have such weights."""
    found = getattr(settings, "quantization_config", None) or getattr(settings.get_text_config(), "quantization_config", None)
    if found:
        kind = found.get("quant_method", "") if isinstance(found, dict) else getattr(found, "quant_method", "")
        what = f"its weights are quantised ({kind or 'quantization_config in config.json'})"
        raise ModelError(what, model.path, "Use the model without quantisation, in bfloat16 or float32")


def _check_class(model: Model, settings: Any) -> None:
    """Raise ModelError for an architecture that vLLM has no class for, where it cannot run the class of transformers either."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    if model.trust_remote_code:
        return
    names = settings.architectures or [MODEL_MAPPING_NAMES.get(settings.model_type)]  # as vLLM fills a missing list
    if any(name and has_class(name) is not False for name in names):
        return
    if not settings.architectures:
        remedy = 'Add "architectures" to config.json, as save_pretrained of transformers writes it'
        raise ModelError("its configuration names no architecture, so vLLM does not know its class", model.path, remedy)
    own = getattr(transformers, names[0], None)
    runs = own is not None and (own.is_backend_compatible() or own._can_set_attn_implementation())  # vLLM's own condition
    if not runs or settings.model_type in NOT_THROUGH:
        what = f"vLLM has no class for {names[0]}, and cannot run that of transformers"
        raise ModelError(what, model.path, "Use a model of another family: actors/README.md has a table")


def _comes_apart(net: Any) -> bool:
    """Whether a model is a decoder, which makes hidden states, and an output layer, which makes logits of them."""
    decoder = net.get_decoder() if hasattr(net, "get_decoder") else None
    return hasattr(decoder, "get_input_embeddings") and decoder is not net and net.get_output_embeddings() is not None


def _check_vocabulary(model: Model, settings: Any) -> None:
    """Raise ModelError for a tokenizer that writes ids which the model does not have.

    Added tokens may lie beyond: those of Gemma 3 stand for images, which its text models do not read.
    """
    size = getattr(settings.get_text_config(), "vocab_size", None)
    tokenizer = tokenizer_of(model)
    largest = max(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder), default=0)
    if isinstance(size, int) and largest >= size:
        what = f"the tokenizer has ids up to {largest}, and the model has {size} tokens"
        raise ModelError(what, model.path, "Take the tokenizer that belongs to the model, or resize its embedding")


def _check_teachers(run: Run, for_gpus: bool) -> None:
    """Raise ModelError for a teacher's own model that engines compute wrongly. A server's model is not ours to look at."""
    for teacher in run.teachers.values():
        model = run.model_of(teacher)
        if model != run.model and not teacher.server:
            _check_adapter(model)
            settings = settings_of(model)
            check_window(model, settings)
            _check_parts(model, settings)
            _check_class(model, settings)
            _check_vocabulary(model, settings)
            if settings.get_text_config() is settings:  # one that also reads images is none that transformers builds by itself
                blueprint(model, settings)
            _check_alike(run, model, settings, for_gpus or run.pool_of(teacher).placement.gpus > 0)


def _check_alike(run: Run, model: Model, settings: Any, on_gpu: bool) -> None:
    """Raise ModelError for a family that vLLM computes otherwise than transformers does."""
    text = settings.get_text_config()
    if text.model_type in NOT_ON_CPU and not on_gpu:
        what = f"is of family {text.model_type}, which vLLM's build for CPUs computes wrongly, or not at all"
        raise ModelError(what, model.path, "Use another model, or engines on GPUs")
    if text.model_type.startswith("ernie4_5") and getattr(text, "use_bias", False):
        what = "has biases (use_bias), which vLLM does not load: log-probs differ by .7 nat on average"
        raise ModelError(what, model.path, "Use another model")
    if text.model_type == "cohere2" and text.sliding_window and model.max_model_len > text.sliding_window:
        raise ModelError(
            f"vLLM's sliding window has one token more than that of transformers, {text.sliding_window}",
            model.path,
            f"Lower model.max_model_len {model.max_model_len} to {text.sliding_window} or less",
        )
    if text.model_type in IN_BFLOAT16 and model.dtype == "float32" and run.train.logprob_gap is None:
        raise ModelError(
            "vLLM computes a part of its activation in bfloat16, so that log-probs differ by 4e-4 nat on average",
            model.path,
            "Set model.dtype=bfloat16, or accept it with train.logprob_gap=1e-3",
        )


def _check_head(model: Model, net: Any, form: head_form.Form) -> None:
    """Raise ModelError when a model makes its logits in a way that the trainer's head does not know."""
    gap = head_form.gap(net, form)
    if gap != gap and net.config.get_text_config() is net.config:  # its code does not run with hidden states of ours
        what = "has something between its decoder and its output layer, or takes its decoder otherwise than others do"
        raise ModelError(what, model.path, "Use a model whose logits are its output layer's, of its decoder's hidden states")
    if gap > _SAME:
        raise ModelError(
            f"does something unknown to its logits: they differ by {gap:.2g} (relative) from {form}",
            model.path,
            "Use a model whose logits are the output layer's, scaled or capped as pipeline/models/head_form.py says",
        )
