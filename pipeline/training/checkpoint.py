"""Adapter and training state as safetensors and JSON, never pickle. Resumed training equals uninterrupted training exactly.

    policy/<n>/  adapter_model.safetensors, adapter_config.json              vLLM and peft load these
    train/<n>/   the same, optimizer.safetensors, cursor.json                training resumes from these

There is no random state to keep. The shuffle depends on (seed, round) alone, and dropout on (seed, round, rank).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.config import Model
from pipeline.errors import ModelError, TrainingError, first_line
from pipeline.store.documents import Document, Number, parse
from pipeline.store.folders import ADAPTER, CURSOR, OPTIMIZER, POLICY_REMEDY, STATE_REMEDY
from pipeline.training import adapter as adapter_files
from pipeline.training.step import Trainer
from pipeline.training.student import Student

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


class Cursor(Document):
    """cursor.json: the round to train next, the optimiser steps before it, and the seed of the run."""

    round: Number
    step: Number
    seed: int


def gather(trainer: Trainer) -> dict[str, Tensor]:
    """The adapter of a trainer as whole float32 tensors on the CPU. Every rank must call this, since tensors are sharded.

    Raises TrainingError on rank 0 when a weight is not finite, so that no such weight is published.
    """
    adapter = {name: _full(p.data) for name, p in trainer.parameters().items()}
    broken = [name for name, value in adapter.items() if not value.isfinite().all()] if trainer.rank == 0 else []
    if broken:
        raise TrainingError(
            f"{len(broken)} of {len(adapter)} adapter tensors are not finite, {broken[0]} first",
            f"step {trainer.step}",
            "Lower train.learning_rate or train.grad_clip; the policy before it is untouched",
        )
    return adapter


def save_policy(trainer: Trainer, adapter: dict[str, Tensor], folder: Path) -> None:
    """Write the policy into a local folder, in the dtype to which engines cast it. `adapter` is from `gather`. For rank 0."""
    dtype = getattr(torch, trainer.run.model.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    _save_adapter(trainer.student, {name: value.to(dtype) for name, value in adapter.items()}, folder)


def save(trainer: Trainer, next_round: int, adapter: dict[str, Tensor], folder: Path) -> None:
    """Write the state of a trainer that has finished the rounds before `next_round` into a local folder.

    `adapter` is from `gather`. Every rank must call this, because sharded moments are gathered. Rank 0 alone writes.
    """
    moments = {
        f"{name}.{key}": _full(value)
        for name, p in trainer.parameters().items()
        for key, value in trainer.optimizer.state.get(p, {}).items()
    }
    if trainer.rank != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _save_adapter(trainer.student, adapter, folder)
    save_file(moments, folder / OPTIMIZER)
    cursor = {"round": next_round, "step": trainer.step, "seed": trainer.run.seed}
    (folder / CURSOR).write_text(json.dumps(cursor, indent=1))


def distance(folder: Path, other: Path) -> float:
    """The largest difference of a weight between two saved adapters. Raises ModelError for a file that cannot be read."""
    mine, yours = tensors(folder / ADAPTER), tensors(other / ADAPTER)
    if mine.keys() != yours.keys():
        return float("inf")
    return max(float((mine[name].float() - yours[name].float()).abs().max()) for name in mine)


def load_adapter(student: Student, folder: Path, model: Model) -> None:
    """Put a saved adapter into a student that is not spread over ranks yet.

    Raises ModelError when rank, alpha, targets or base of the adapter differ from the configuration, or tensors are missing.
    """
    adapter_files.check(folder, model, str(folder))
    saved = tensors(folder / ADAPTER)
    own = {name.replace(".default", ""): p.shape for name, p in student.model.named_parameters() if "lora_" in name}
    if wrong := [name for name, tensor in saved.items() if name in own and tensor.shape != own[name]]:
        raise ModelError(f"{wrong[0]} has shape {list(saved[wrong[0]].shape)}", str(folder / ADAPTER), adapter_files.REMEDY)
    if broken := [name for name, tensor in saved.items() if not tensor.isfinite().all()]:
        raise ModelError(f"{broken[0]} is not finite", str(folder / ADAPTER), POLICY_REMEDY)
    result: Any = set_peft_model_state_dict(student.model, saved)
    missing = [key for key in result.missing_keys if "lora_" in key]
    if missing or result.unexpected_keys:
        raise ModelError(f"tensors are missing or unknown: {(missing + result.unexpected_keys)[:3]}", str(folder / ADAPTER))


def load_optimizer(trainer: Trainer, folder: Path) -> int:
    """Restore optimiser and step count of a trainer. Returns the number of the round to train next.

    Raises TrainingError when the state belongs to another seed or lacks a tensor.
    """
    cursor = read_cursor(folder)
    if cursor.seed != trainer.run.seed:
        raise TrainingError(f"was made with seed {cursor.seed}, this run has {trainer.run.seed}", str(folder / CURSOR))
    saved = tensors(folder / OPTIMIZER)
    for name, parameter in trainer.parameters().items() if saved else ():  # nothing is saved before the first step
        try:
            step, *moments = (saved[f"{name}.{key}"] for key in MOMENTS)
        except KeyError as error:
            remedy = "Delete this state and its policy to go one round back"
            raise TrainingError(f"lacks {error}", str(folder / OPTIMIZER), remedy) from None
        if any(moment.shape != parameter.shape or not moment.isfinite().all() for moment in moments) or step.numel() != 1:
            raise TrainingError(f"{name} has another shape, or is not finite", str(folder / OPTIMIZER), STATE_REMEDY)
        state = (step, *(_placed(moment, parameter) for moment in moments))
        trainer.optimizer.state[parameter] = dict(zip(MOMENTS, state, strict=True))
    trainer.step = cursor.step
    return cursor.round


def read_cursor(folder: Path) -> Cursor:
    """Where the training state in a local folder stands. Raises StoreError for a damaged file, and TrainingError for none."""
    file = folder / CURSOR
    try:
        return parse(Cursor, file.read_bytes(), str(file), STATE_REMEDY)
    except OSError as error:
        raise TrainingError(f"cannot be read ({error.strerror})", str(file), STATE_REMEDY) from error


def tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ModelError when it is none."""
    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"cannot be read ({first_line(error)})", str(file), POLICY_REMEDY) from error


def _save_adapter(student: Student, tensors: dict[str, Tensor], folder: Path) -> None:
    config = student.model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # peft keeps a set, whose order changes from process to process
    config.save_pretrained(folder)
    named = get_peft_model_state_dict(student.model, state_dict=tensors, save_embedding_layers=False)
    save_file(named, folder / ADAPTER, metadata={"format": "pt"})


def _full(value: Tensor) -> Tensor:
    """A tensor as a whole on the CPU, gathered when it is sharded."""
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().to("cpu", copy=True).contiguous()


def _placed(value: Tensor, like: torch.nn.Parameter) -> Tensor:
    """`value` on the device of `like`, and in the same shards."""
    if isinstance(like.data, DTensor):
        return distribute_tensor(value.to(like.device), like.data.device_mesh, like.data.placements)
    return value.to(like.device)
