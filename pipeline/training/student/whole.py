"""The files of whole weights, where `model.tuning` is full, and a check that they belong to a run. Trainer and engines use it.

    policy/<n>/  config.json, model*.safetensors, probe.json     transformers and vLLM open these
    train/<n>/   weights*.safetensors, optimizer*.safetensors, cursor.json

`probe.json` has a fixed sequence and its log-probs by the trainer, under the policy and under the base. An engine that has loaded
the policy scores the sequence too: nothing else shows that the weights it loaded are those that answer. No torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config import Model
from pipeline.errors import ModelError
from pipeline.store.documents import Count, Document, parse
from pipeline.store.folders import ADAPTER_CONFIG, CONFIG, POLICY_REMEDY, WEIGHTS

PROBE = "probe.json"
STATE = (WEIGHTS, "optimizer")  # how the names of a training state's files begin
SHARD_BYTES = 1_000_000_000  # of the largest file: a store writes and checks files one at a time, in memory
REMEDY = "Use a policy that this run's trainer published, with the settings the run was started with"
_TOKENS = 40

Tokens = Annotated[tuple[Count, ...], Field(min_length=2)]
Logprobs = tuple[Annotated[float, Field(le=1e-3, allow_inf_nan=False)], ...]


class Probe(Document):
    """probe.json: ids of a sequence, and the log-probs in nats of all but its first token, under the policy and the base.

    dtype: the trainer's, in which they were computed. "" in a file from before 2026-11-30.
    """

    tokens: Tokens
    logprobs: Logprobs
    base_logprobs: Logprobs
    dtype: Literal["", "float32", "bfloat16"] = ""


def at(model: Model, folder: Path) -> Model:
    """The settings of a run's model, with the whole weights of a policy for its own."""
    return model.model_copy(update={"path": str(folder), "revision": None})


def sequence(vocab_size: int, window: int) -> list[int]:
    """The ids of the fixed sequence. It fits the vocabulary and the window."""
    return [(5 + 3 * place) % vocab_size for place in range(max(2, min(_TOKENS, window)))]


def read_probe(folder: Path) -> Probe:
    """The probe of a policy in a local folder. Raises ModelError when there is none, and StoreError for a damaged one."""
    try:
        return parse(Probe, (folder / PROBE).read_bytes(), str(folder / PROBE), POLICY_REMEDY)
    except OSError as error:
        raise ModelError(f"{PROBE} cannot be read ({error.strerror})", str(folder), REMEDY) from None


def check(folder: Path, where: str, hidden_size: int) -> None:
    """Raise ModelError, with `where`, unless the folder has whole weights of a model of this width."""
    try:
        saved = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        is_adapter = (folder / ADAPTER_CONFIG).exists()
        what = "holds an adapter, and model.tuning is full" if is_adapter else f"no weights here: {CONFIG} is missing"
        raise ModelError(what, where, REMEDY) from None
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{CONFIG} is not JSON ({error})", where, POLICY_REMEDY) from None
    text = saved.get("text_config", saved) if isinstance(saved, dict) else {}
    width = text.get("hidden_size", hidden_size) if isinstance(text, dict) else None
    if width != hidden_size:
        raise ModelError(f"the weights' layers are {width} wide, the model's {hidden_size}", where, REMEDY)
