"""Which layers LoRA trains: the names of `model.lora_targets` against the layers that a model has.

`all-linear` names every linear layer that engines can serve. It also takes the place of the default names where a model lacks one
of them. A run keeps the names, so that a later version of this project trains the same layers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from pipeline.config import Model, Run
from pipeline.errors import SettingError, nearest
from pipeline.models.blueprint import blueprint, has_experts
from pipeline.models.resolve import MODEL_NAME

ALL_LINEAR = "all-linear"
DEFAULT = Model().lora_targets
_SETTING = "model.lora_targets"
_HEAD = "the head's log-probs are computed from its plain weight"
UNSERVED = {  # layers that an engine cannot serve with LoRA, and why
    "lm_head": _HEAD,
    "embed_out": _HEAD,
    "kv_b_proj": "engines fold its weight into attention, and ignore its adapter",
    "embed_tokens": "engines mix up requests with and without the adapter there",
}
_MAMBA = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})  # as peft names them
_EXPERTS = frozenset(
    {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "gate", "router", "shared_expert_gate", "wg"}
)
_EXPERT = "peft trains experts as parameters, which engines do not load"


def with_targets(run: Run, new: bool = True) -> Run:
    """A run whose `model.lora_targets` are names of layers.

    `all-linear` becomes those names. In a `new` run the default does as well, when the model lacks one of the default names.
    Raises ModelError when the model is not there.
    """
    asked = run.model.lora_targets
    if asked != (ALL_LINEAR,) and (not new or asked != DEFAULT or run.model.path == MODEL_NAME):
        return run
    net = blueprint(run.model)
    if asked == DEFAULT and set(asked) <= set(served(net)):
        return run
    return run.model_copy(update={"model": run.model.model_copy(update={"lora_targets": tuple(served(net))})})


def linear(net: Any) -> Counter[str]:
    """How many linear layers a model has of each name, without its head. The name is the last part of the dotted one."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = net.get_output_embeddings()
    layers = (name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head)
    return Counter(name.rpartition(".")[2] for name in layers)


def served(net: Any) -> list[str]:
    """The names of linear layers that engines serve with LoRA, in the order of the model."""
    return [name for name in linear(net) if not unserved(net, name)]


def unserved(net: Any, name: str) -> str:
    """Why engines do not serve a layer of this name; "" when they do."""
    if name in UNSERVED:
        return UNSERVED[name]
    if name.isdigit():
        return "its name is a number, and peft would take other modules of that name too"
    if has_experts(net) and name in _EXPERTS:
        return _EXPERT
    return _refused(net.config.model_type, name)


def _refused(kind: str, name: str) -> str:
    """Layers that peft refuses, or that vLLM builds in another form than transformers, so that their adapters do not fit."""
    if kind in _MAMBA and name in ("out_proj", "conv1d"):
        return "peft refuses it in models with Mamba layers"
    return "vLLM builds this layer in another form" if name in OTHER_FORM.get(kind, ()) else ""


OTHER_FORM: dict[str, tuple[str, ...]] = {"glm": ("gate_up_proj",), "glm4": ("gate_up_proj",)}


def check(model: Model, net: Any, begun: bool = False) -> str:
    """The line that says which layers are trained, and which linear layers are not.

    Raises SettingError for a name that no layer has, or that engines cannot serve. A run that has `begun` goes on with names that
    match nothing.
    """
    there, names = linear(net), model.lora_targets
    if ALL_LINEAR in names:
        raise SettingError(f"'{ALL_LINEAR}' stands alone", _SETTING, f"Write model.lora_targets={ALL_LINEAR}")
    for name in names:
        if why := unserved(net, name):
            raise SettingError(f"{name} cannot be trained: {why}", _SETTING, _instead(net))
        if name not in there and not begun:
            hint = nearest(name, there, _instead(net), "Did you mean '{}'?")
            raise SettingError(f"no linear layer of {model.path} is named {name}", _SETTING, hint)
    trained = [name for name in there if name in names]
    if not trained:
        raise SettingError(f"none of {', '.join(names)} is a linear layer of {model.path}", _SETTING, _instead(net))
    left = [f"{name} ({unserved(net, name)})" if unserved(net, name) else name for name in there if name not in names]
    said = f"LoRA trains {sum(there[name] for name in trained)} linear layers: {', '.join(trained)}"
    return said + (f"; not {', '.join(left)}" if left else "; these are all but the head")


def _instead(net: Any) -> str:
    return f"This model has {', '.join(served(net))}; '{ALL_LINEAR}' takes them all"
