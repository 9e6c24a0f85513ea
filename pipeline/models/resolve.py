"""The one way to open the configuration, tokenizer or weights that `model.path` names, with transformers."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.config import Model
from pipeline.errors import ModelError, UnreachableError, first_line, whole_cause
from pipeline.notices import NOTICE_S, late

MODEL_NAME = "tiny-reasoner"
REACH_S = 5.0
_MADE = "assets-cache/"  # the folder of models that `make` builds
_REMEDY = "Set model.path (or teachers.NAME.model) to a folder or hub id; unset HF_HUB_OFFLINE if it must be downloaded"


def asset_path() -> Path:
    """The folder of the shipped tiny reasoner: weights, configuration, tokenizer."""
    return Path(str(files("pipeline") / "models" / "tiny_reasoner"))


def resolve_model(path: str) -> str:
    """`path` with `~` expanded, or the shipped folder when it is the name of the tiny reasoner."""
    return str(asset_path()) if path == MODEL_NAME else os.path.expanduser(path)


def open_model(kind: Any, model: Model, part: str, **options: Any) -> Any:
    """The object that `kind.from_pretrained` (AutoConfig, AutoTokenizer, ...) loads for a run's model.

    Raises ModelError when there is no such model. It is an UnreachableError when the hub cannot be asked for what its local copy
    lacks. `part` names in the message what cannot be loaded ("tokenizer", "weights").
    """
    from huggingface_hub.errors import StrictDataclassError  # transformers loads it anyway, and others need not

    path = resolve_model(model.path)
    check_folder(path)
    if not (os.path.isdir(path) or hub_answers()):
        options = options | {"local_files_only": True}  # else each file is asked for again and again, for a minute
    where = "its folder" if os.path.isdir(path) else "the Hugging Face hub or its local copy"
    try:
        with late(f"model {part}", f"waiting for the {part} of {path}, from {where}: for {NOTICE_S:g} s so far."):
            return kind.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code, **options)
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
        AttributeError,
        TypeError,
        ArithmeticError,
        StrictDataclassError,
    ) as error:
        kind_of, why = UnreachableError if _unanswered(error) else ModelError, first_line(error)
        why = whole_cause(error, 300) if why.endswith(":") else why
        raise kind_of(f"no model here: the {part} cannot be loaded ({why})", path, _REMEDY) from error


def check_folder(path: str) -> None:
    """Raise ModelError when a path means a local folder, since no hub id looks like it, and there is none.

    `models/tiny` means one where there is a folder `models` beside it.
    """
    above = path.partition("/")[0]
    local = path.startswith(("/", ".", "~", _MADE)) or path.count("/") > 1 or ("/" in path and os.path.isdir(above))
    if local and not os.path.isdir(path):
        raise ModelError("there is no such folder", path, _REMEDY)


@lru_cache(maxsize=1)
def hub_answers() -> bool:
    """Whether the hub may be asked and somebody listens at its address. It is looked at once, for at most REACH_S seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    if any(name.lower() in {"https_proxy", "all_proxy"} for name in os.environ):
        return True  # the proxy knows
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        with socket.create_connection(
            (address.hostname or "", address.port or (80 if address.scheme == "http" else 443)), REACH_S
        ):
            return True
    except (OSError, ValueError):
        return False


def vocabulary_size(model: Model) -> int:
    """Rows of the output head of a run's model, which may be more than its tokenizer has tokens. Raises ModelError."""
    from transformers import AutoConfig

    return int(open_model(AutoConfig, model, "configuration").get_text_config().vocab_size)


def local_folder(model: Model) -> str:
    """The folder of a run's model on this machine: its own, or that of its revision in the hub's local copy."""
    path = resolve_model(model.path)
    if os.path.isdir(path):
        return path
    from transformers.utils import cached_file

    only = not hub_answers()
    return str(Path(str(cached_file(path, "config.json", revision=model.revision or "main", local_files_only=only))).parent)


def has_weights(model: Model) -> bool:
    """Whether all weights of a run's model are on this machine, in its folder or in the hub's local copy. Nothing is loaded."""
    path = resolve_model(model.path)
    if os.path.isdir(path):
        return True
    from transformers.utils import cached_file

    def here(name: str) -> str | None:
        """The path of a file of the model on this machine, or None."""
        with contextlib.suppress(OSError):
            return str(cached_file(path, name, revision=model.revision or "main", local_files_only=True))
        return None

    if (index := here("model.safetensors.index.json")) is not None:
        return all(map(here, set(json.loads(Path(index).read_text())["weight_map"].values())))
    return here("model.safetensors") is not None


def _unanswered(error: BaseException | None) -> bool:
    """Whether an error of transformers comes from a hub that was not reached, or that may not be asked."""
    while error is not None and type(error).__name__ not in {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        error = error.__cause__ or error.__context__
    return error is not None
