"""The tokenizer of a model, loaded in one way for every user of it, and the hash that says whether two agree."""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from typing import Any

from pipeline.config import Model
from pipeline.digest import digest
from pipeline.errors import ModelError
from pipeline.models.resolve import resolve_model

_LOADING = threading.Lock()  # the threads of a task share one tokenizer


def tokenizer_of(model: Model) -> Any:
    """The tokenizer of a run's model, loaded once per process. Raises ModelError when it cannot be loaded or has no template."""
    with _LOADING:
        return _cached(model.path, model.revision, model.trust_remote_code)


@lru_cache(maxsize=4)
def _cached(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    return load_tokenizer(resolve_model(path), revision, trust_remote_code)


def template_hash(tokenizer: Any) -> str:
    """Hash of chat template, special tokens and vocabulary: equal hashes turn the same messages into the same ids."""
    parts = [tokenizer.chat_template, tokenizer.special_tokens_map, sorted(tokenizer.get_vocab().items())]
    return digest(parts)


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local folder or a hub id. Raises ModelError when it cannot be loaded or has no chat template."""
    if _looks_local(path) and not os.path.isdir(path):
        raise ModelError("there is no such folder", path, "Set model.path to a folder with model and tokenizer, or to a hub id")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the tokenizer cannot be loaded: {cause}", path, "Check model.path, or unset HF_HUB_OFFLINE if it must be downloaded"
        ) from error
    check_template(tokenizer)
    return tokenizer


def _looks_local(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1


def check_template(tokenizer: Any) -> None:
    """Raise ModelError where a tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template",
            str(getattr(tokenizer, "name_or_path", "")),
            "Use an instruction-tuned model, or put a chat_template.jinja beside its tokenizer",
        )
