"""The tokens that end a trace: those that the tokenizer, the model and its generation settings name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.config import Model
from pipeline.errors import ModelError, first_line
from pipeline.models.resolve import hub_answers, resolve_model
from pipeline.models.tokenizers.tokenizer import tokenizer_of


def stop_ids(model: Model, settings: Any) -> list[int]:
    """Ids of the tokens that end a trace. `settings` is the configuration of the model.

    Raises ModelError when nobody names a token that the model can write, since every trace would then be cut off.
    """
    of_model = (getattr(config, "eos_token_id", None) for config in (settings.get_text_config(), settings))
    named = {one for eos in (*of_model, _generation(model), tokenizer_of(model).eos_token_id) for one in _as_ids(eos, model.path)}
    size = getattr(settings.get_text_config(), "vocab_size", None)
    written = sorted(one for one in named if one >= 0 and (size is None or one < size))
    if not written:
        named_none = "neither the tokenizer nor the model names a token that ends a trace"
        stray = f"no token that ends a trace ({', '.join(map(str, sorted(named)))}) is one of the model's {size}"
        what = f"{stray if named else named_none}: all traces would be cut off"
        raise ModelError(what, model.path, "Set eos_token in its tokenizer_config.json")
    return written


def _generation(model: Model) -> Any:
    """eos_token_id of generation_config.json, or None. Many models have no such file."""
    from transformers import GenerationConfig

    path, revision = resolve_model(model.path), model.revision or "main"
    here = os.path.isdir(path) or not hub_answers()  # else each file is asked for again and again, for a minute
    try:
        return GenerationConfig.from_pretrained(path, revision=revision, local_files_only=here).eos_token_id
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and not (Path(path) / "generation_config.json").is_file():
            return None
        what = f"generation_config.json cannot be read ({first_line(error)})"
        raise ModelError(what, model.path, "Correct the file, or remove it") from error


def _as_ids(eos: Any, where: str) -> list[int]:
    """The end-of-sequence ids of a configuration, which holds one id, a list of ids, or None. Raises ModelError for others."""
    found = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
    if wrong := [one for one in found if not isinstance(one, int) or isinstance(one, bool)]:
        raise ModelError(
            f"eos_token_id: {wrong[0]!r} is no number of a token", where, "Correct config.json or generation_config.json"
        )
    return found
