"""A model without its weights: the modules that transformers would build, on torch's meta device. Seconds, and no memory."""

from __future__ import annotations

from typing import Any

from pipeline.config import Model
from pipeline.errors import ModelError, whole_cause
from pipeline.models.resolve import open_model

_MISTAKES = (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, RuntimeError, AssertionError, ArithmeticError)


def settings_of(model: Model) -> Any:
    """The configuration of a run's model. Raises ModelError when there is none."""
    from transformers import AutoConfig

    return open_model(AutoConfig, model, "configuration")


def blueprint(model: Model, settings: Any | None = None) -> Any:
    """The modules of a run's model. Raises ModelError when it is no causal language model that transformers can build."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = settings_of(model) if settings is None else settings
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=model.trust_remote_code)
    except _MISTAKES as error:
        what = f"is no causal language model that transformers can build ({whole_cause(error)})"
        missing = isinstance(error, ImportError)
        raise ModelError(
            what, model.path, "Install the package that it names" if missing else "Use a model that is one"
        ) from error


def has_experts(net: Any) -> bool:
    """Whether a model is a mixture of experts."""
    return any(name.endswith("experts") or type(module).__name__.endswith("Experts") for name, module in net.named_modules())
