"""The tokenizer of a model: the one way to load it, and the hash that says whether two tokenizers agree."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from pipeline.config import Model
from pipeline.digest import digest
from pipeline.errors import ModelError, first_line
from pipeline.models.resolve import check_folder, hub_answers, open_model, resolve_model
from pipeline.models.tokenizers.light import LightTokenizer, read_light
from pipeline.models.tokenizers.read_tokenizer import OPTIONS, facts_of
from pipeline.notices import NOTICE_S, late

_LOADING = threading.Lock()  # the threads of a task share one tokenizer
_TOKENIZERS: dict[tuple[str, str | None, bool], Any] = {}


def tokenizer_of(model: Model) -> Any:
    """The tokenizer of a run's model, loaded once per process. Raises ModelError when it cannot be loaded or has no template.

    It is a LightTokenizer wherever that serves: it is there in 1.5 processor seconds, and transformers in 4.
    """
    with _LOADING:
        key = _key(model)
        if key not in _TOKENIZERS:
            light = None if model.trust_remote_code or "transformers" in sys.modules else _light(*key[:2])
            tokenizer = light or _of_transformers(model)
            check_template(tokenizer)
            _TOKENIZERS[key] = tokenizer
        return _TOKENIZERS[key]


def loaded_tokenizer(model: Model) -> LightTokenizer | None:
    """The tokenizer of a model, if this process has it already and it can be handed to another one."""
    found = _TOKENIZERS.get(_key(model))
    return found if isinstance(found, LightTokenizer) else None


def keep_tokenizer(model: Model, tokenizer: LightTokenizer) -> None:
    """Let `tokenizer_of` return this tokenizer, which another process has loaded."""
    with _LOADING:
        _TOKENIZERS.setdefault(_key(model), tokenizer)


def _key(model: Model) -> tuple[str, str | None, bool]:
    return resolve_model(model.path), model.revision, model.trust_remote_code


def _light(path: str, revision: str | None) -> LightTokenizer | None:
    check_folder(path)
    where = "its folder" if os.path.isdir(path) else "the Hugging Face hub or its local copy"
    with late("model tokenizer", f"waiting for the tokenizer of {path}, from {where}: for {NOTICE_S:g} s so far."):
        return read_light(path, revision, offline=not (os.path.isdir(path) or hub_answers()))


def _of_transformers(model: Model) -> Any:
    """The tokenizer, in its light form where it has one: so it is the same in a process that has imported transformers."""
    from transformers import AutoTokenizer

    tokenizer = open_model(AutoTokenizer, model, "tokenizer", **OPTIONS)
    facts = None if model.trust_remote_code else facts_of(tokenizer, model.revision)
    return tokenizer if facts is None else LightTokenizer(facts)


def template_hash(tokenizer: Any) -> str:
    """Hash of chat template, special tokens and vocabulary. With equal hashes, the same messages become the same ids."""
    parts = [tokenizer.chat_template, tokenizer.special_tokens_map, sorted(tokenizer.get_vocab().items())]
    return digest(parts)


def check_template(tokenizer: Any) -> None:
    """Raise ModelError when a tokenizer has no chat template, or several without a default."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template",
            str(getattr(tokenizer, "name_or_path", "")),
            "Use an instruction-tuned model, or put a chat_template.jinja beside its tokenizer",
        )
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(
            f"the tokenizer has several chat templates, and none of them is named default ({first_line(error)[:200]})",
            str(getattr(tokenizer, "name_or_path", "")),
            "Put the one to use into a chat_template.jinja beside its tokenizer",
        ) from error
