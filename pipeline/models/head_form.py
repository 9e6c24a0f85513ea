"""What a model does to its logits after the output layer: it may multiply them, and it may cap them.

    logits = cap * tanh(scale * (W h + b) / cap)        without a cap: scale * (W h + b)

Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, Falcon-H1 by `lm_head_multiplier`. MiniCPM divides hidden
states by hidden_size / dim_model_base. Gemma 2 caps at `final_logit_softcapping`. The trainer's head computes its log-probs from
this form, so `gap` compares it with the code of the model.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Form(NamedTuple):
    """The factor of the logits, and their cap (0: none)."""

    scale: float = 1.0
    cap: float = 0.0


def form_of(settings: Any) -> Form:
    """The form that the configuration of a model tells."""
    text = settings.get_text_config()

    def number(name: str) -> float | None:
        """A setting that is a number other than 0."""
        value = getattr(text, name, None)
        return float(value) if isinstance(value, int | float) and value else None

    scale = 1.0
    if (divisor := number("logits_scaling")) is not None:
        scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
    elif (width := number("dim_model_base")) is not None:
        scale = width / text.hidden_size
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= number(name) or 1.0
    return Form(scale, number("final_logit_softcapping") or 0.0)


def gap(net: Any, form: Form) -> float:
    """The largest relative difference between the logits of a model's code and its form, on random hidden states.

    net: a model on the meta device. Its decoder gives known hidden states, and its output layer is replaced. NaN when its code
    does not run so.
    """
    import torch
    from transformers.modeling_outputs import MoeModelOutputWithPast

    class States(MoeModelOutputWithPast):
        """Hidden states, and None for whatever else a model reads of its decoder's answer (caches, cross attentions)."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    width = net.get_output_embeddings().in_features
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(width, 8, bias=getattr(net.get_output_embeddings(), "bias", None) is not None, device="cpu")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden: Any = torch.randn(1, 3, width, generator=generator)

    output = net.get_output_embeddings()
    for parent in list(net.modules()):
        for name, module in list(parent.named_children()):
            if module is output:
                setattr(parent, name, head)
    net.get_decoder().forward = lambda *_, **__: States(last_hidden_state=hidden)
    try:
        with torch.no_grad(), torch.device("cpu"):
            logits = net(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False).logits[0]
    except Exception:  # the code of any model: nothing is known then
        return float("nan")
    with torch.no_grad():
        expected = form.scale * head(hidden[0])
        expected = form.cap * torch.tanh(expected / form.cap) if form.cap else expected
        return float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-9))
