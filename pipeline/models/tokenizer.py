"""The tokenizer of a model: the one way to load it, and the hash that says whether two tokenizers agree."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

from pipeline.config import Model
from pipeline.digest import digest
from pipeline.errors import ModelError
from pipeline.models.resolve import open_model

_LOADING = threading.Lock()  # the threads of a task share one tokenizer


def tokenizer_of(model: Model) -> Any:
    """The tokenizer of a run's model, loaded once per process. Raises ModelError when it cannot be loaded or has no template."""
    with _LOADING:
        return _loaded(model.path, model.revision, model.trust_remote_code)


@lru_cache(maxsize=4)
def _loaded(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    model = Model(path=path, revision=revision, trust_remote_code=trust_remote_code)
    tokenizer = open_model(AutoTokenizer, model, "tokenizer")
    check_template(tokenizer)
    return tokenizer


def template_hash(tokenizer: Any) -> str:
    """Hash of chat template, special tokens and vocabulary. With equal hashes, the same messages become the same ids."""
    parts = [tokenizer.chat_template, tokenizer.special_tokens_map, sorted(tokenizer.get_vocab().items())]
    return digest(parts)


def check_template(tokenizer: Any) -> None:
    """Raise ModelError when a tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template",
            str(getattr(tokenizer, "name_or_path", "")),
            "Use an instruction-tuned model, or put a chat_template.jinja beside its tokenizer",
        )
