"""Policy and training state as safetensors and JSON, never pickle. Resumed training equals uninterrupted training exactly.

    policy/<n>/  adapter_model.safetensors, adapter_config.json              vLLM and peft load these
    train/<n>/   the same, optimizer.safetensors, cursor.json                training resumes from these

whole.py has the files where all weights are trained. In a policy they have the dtype of engines, and in a state they are float32.
There is no random state to keep. The shuffle depends on (seed, round) alone, and dropout on (seed, round, rank).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from pipeline.config import Model
from pipeline.errors import ModelError, TrainingError, first_line
from pipeline.models.resolve import open_model
from pipeline.store.documents import Document, Number, parse
from pipeline.store.folders import ADAPTER, CONFIG, CURSOR, OPTIMIZER, POLICY_REMEDY, STATE_REMEDY, WEIGHTS
from pipeline.training.step import Trainer
from pipeline.training.student import adapter as adapter_files
from pipeline.training.student import whole
from pipeline.training.student.student import Student, answers

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


class Cursor(Document):
    """cursor.json: the round to train next, the optimiser steps before it, and the seed of the run."""

    round: Number
    step: Number
    seed: int


def gather(trainer: Trainer) -> dict[str, Tensor]:
    """The trained weights as whole float32 tensors on the CPU, on rank 0. Every rank must call this, since tensors are sharded.

    Where all weights are trained, those that a model's class freezes are there too: a policy is a whole model. Other ranks get
    nothing, since a machine may have room for one copy only. Raises TrainingError on rank 0 when a weight is not finite, so that
    no such weight is published.
    """
    student = trainer.student
    parts = dict(student.model.named_parameters()) if student.trains_all else trainer.parameters()
    found = {name: _full(p.data, trainer.rank == 0) for name, p in parts.items()}
    adapter = {name: value for name, value in found.items() if value is not None}
    broken = [name for name, value in adapter.items() if not value.isfinite().all()]
    if broken:
        raise TrainingError(
            f"{len(broken)} of {len(adapter)} trained tensors are not finite, {broken[0]} first",
            f"step {trainer.step}",
            "Lower train.learning_rate or train.grad_clip; the policy before it is untouched",
        )
    return adapter


def save_policy(trainer: Trainer, adapter: dict[str, Tensor], folder: Path) -> None:
    """Write the policy into a local folder, in the dtype to which engines cast it. `adapter` is from `gather`. For rank 0.

    Weights that are not trained stay float32, as buffers do: engines keep some of them so, whatever model.dtype says.
    """
    dtype, trained = getattr(torch, trainer.run.model.dtype), trainer.parameters()
    weights = {name: value.to(dtype) if name in trained else value for name, value in adapter.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.student.trains_all:
        _save_model(trainer.student, weights, folder, trainer.run.model.dtype)
        return
    _save_adapter(trainer.student, weights, folder)


def save(trainer: Trainer, next_round: int, adapter: dict[str, Tensor], folder: Path) -> None:
    """Write the state of a trainer that has finished the rounds before `next_round` into a local folder.

    `adapter` is from `gather`. Every rank must call this, because sharded moments are gathered. Rank 0 alone writes.
    """
    found = {
        f"{name}.{key}": _full(value, trainer.rank == 0)
        for name, p in trainer.parameters().items()
        for key, value in trainer.optimizer.state.get(p, {}).items()
    }
    if trainer.rank != 0:
        return
    moments = {name: value for name, value in found.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.student.trains_all:
        for stem, tensors in zip(whole.STATE, (adapter, moments), strict=True):
            _save_parts(tensors, folder, stem)
    else:
        _save_adapter(trainer.student, adapter, folder)
        save_file(moments, folder / OPTIMIZER)
    cursor = {"round": next_round, "step": trainer.step, "seed": trainer.run.seed}
    (folder / CURSOR).write_text(json.dumps(cursor, indent=1))


def distance(folder: Path, other: Path) -> float:
    """The largest difference of a weight between two saved policies. Raises ModelError for a file that cannot be read."""
    mine, yours = (_parts(path, "") for path in (folder, other))
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


def load_policy(student: Student, folder: Path, model: Model) -> None:
    """Put a policy, or the weights of a training state, into a student that is not spread over ranks yet.

    Raises ModelError when they do not fit the run, or when a file cannot be read.
    """
    if not student.trains_all:
        load_adapter(student, folder, model)
        return
    is_state = any(folder.glob(f"{WEIGHTS}*.safetensors"))
    if not is_state:
        whole.check(folder, str(folder), student.base.config.get_text_config().hidden_size)
    saved = _parts(folder, WEIGHTS) if is_state else whole_weights(student, whole.at(model, folder), torch.float32)
    with torch.no_grad():
        for name, parameter in _fitting(student, saved, str(folder)).items():
            if not saved[name].isfinite().all():
                raise ModelError(f"{name} is not finite", str(folder), POLICY_REMEDY)
            parameter.copy_(saved[name])


def whole_weights(student: Student, model: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a model, by the names of the student's parameters. Raises ModelError when they do not fit."""
    loaded: Any = open_model(AutoModelForCausalLM, model, "weights", dtype=dtype)
    saved = {name: parameter.data for name, parameter in loaded.named_parameters()}
    _fitting(student, saved, model.path)
    return saved


def _fitting(student: Student, saved: dict[str, Tensor], where: str) -> dict[str, torch.nn.Parameter]:
    """The student's parameters by name. Raises ModelError unless the saved ones have their names and shapes."""
    own = dict(student.model.named_parameters())
    if wrong := sorted(own.keys() ^ saved.keys()) or [name for name in own if own[name].shape != saved[name].shape]:
        raise ModelError(f"{wrong[0]} is missing, unknown or of another shape", where, whole.REMEDY)
    return own


def targets(trainer: Trainer) -> list[str]:
    """The names of the layers that have an adapter, such as q_proj."""
    return sorted({_target_of(name) for name in trainer.parameters()} - {""})


def _target_of(name: str) -> str:
    """The target of LoRA whose B a parameter is; "" for another parameter."""
    layer, _, part = name.partition(".lora_B")
    return layer.removesuffix(".base_layer").rpartition(".")[2] if part else ""


@contextmanager
def shaken(trainer: Trainer, target: str, times: float = 1.0) -> Iterator[None]:
    """A block in which the adapter of one target of LoRA is a random one. At policy 0, where B is zero.

    B has a spread of .2 sqrt(3 r) / alpha, so many `times`. With peft's A, a layer then changes by that many fifths of a weight
    of spread 1 / sqrt(width). Every rank must enter it.
    """
    model = trainer.run.model
    spread = times * 0.2 * (3 * model.lora_rank) ** 0.5 / model.lora_alpha
    parts = [p for name, p in trainer.parameters().items() if _target_of(name) == target]
    torch.manual_seed(trainer.run.seed)
    with torch.no_grad():
        for part in parts:
            part.normal_(0, spread)
        try:
            yield
        finally:
            for part in parts:
                part.zero_()


def probe(trainer: Trainer) -> whole.Probe:
    """What an engine must answer once it has loaded this policy's whole weights. Every rank must call this."""
    student = trainer.student
    tokens = whole.sequence(student.vocab_size, trainer.run.model.max_model_len)
    student.eval()
    logprobs = answers(trainer.module, trainer.device, tokens)
    student.train()
    said = {"logprobs": logprobs, "base_logprobs": student.base_answers}
    return whole.Probe.model_validate({"tokens": tuple(tokens), **said, "dtype": trainer.run.train.dtype})


def load_optimizer(trainer: Trainer, folder: Path) -> int:
    """Restore optimiser and step count of a trainer. Returns the number of the round to train next.

    Raises TrainingError when the state belongs to another seed or lacks a tensor.
    """
    cursor = read_cursor(folder)
    if cursor.seed != trainer.run.seed:
        raise TrainingError(f"was made with seed {cursor.seed}, this run has {trainer.run.seed}", str(folder / CURSOR))
    saved = _parts(folder, whole.STATE[1])
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


def _parts(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of all safetensors files in a folder whose names begin with `stem`. Raises ModelError for a damaged file."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob(f"{stem}*.safetensors")):
        found |= tensors(file)
    return found


def _save_parts(tensors: dict[str, Tensor], folder: Path, stem: str) -> None:
    """Write tensors into files of at most whole.SHARD_BYTES each, unless one tensor is larger."""
    groups: list[dict[str, Tensor]] = [{}]
    room = whole.SHARD_BYTES
    for name, value in tensors.items():
        if groups[-1] and value.nbytes > room:
            groups.append({})
            room = whole.SHARD_BYTES
        groups[-1][name] = value
        room -= value.nbytes
    for number, group in enumerate(groups):
        save_file(group, folder / f"{stem}-{number:05d}.safetensors")


def _save_model(student: Student, tensors: dict[str, Tensor], folder: Path, dtype: str) -> None:
    """Write whole weights as a folder that transformers and vLLM open. `tensors` has its parameters."""
    kept = {name for module, buffers in _persistent(student.base) for name in (f"{module}{buffer}" for buffer in buffers)}
    buffers = {name: value.detach().cpu().clone() for name, value in student.base.named_buffers() if name in kept}
    student.base.save_pretrained(folder, state_dict=tensors | buffers, max_shard_size=whole.SHARD_BYTES)
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | {"dtype": dtype}, indent=2, sort_keys=True) + "\n")


def _persistent(model: torch.nn.Module) -> list[tuple[str, set[str]]]:
    """(prefix of a module's names, its buffers that belong into a checkpoint) of every module."""
    return [
        (f"{name}." if name else "", set(module._buffers) - module._non_persistent_buffers_set)
        for name, module in model.named_modules()
    ]


def _save_adapter(student: Student, tensors: dict[str, Tensor], folder: Path) -> None:
    config = student.model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # peft keeps a set, whose order changes from process to process
    config.save_pretrained(folder)
    named = get_peft_model_state_dict(student.model, state_dict=tensors, save_embedding_layers=False)
    save_file(named, folder / ADAPTER, metadata={"format": "pt"})


def _full(value: Tensor, wanted: bool) -> Tensor | None:
    """A tensor as a whole on the CPU, gathered when it is sharded. None for a rank that does not want it."""
    gathered = value.full_tensor() if isinstance(value, DTensor) else value
    return gathered.detach().to("cpu", copy=True).contiguous() if wanted else None


def _placed(value: Tensor, like: torch.nn.Parameter) -> Tensor:
    """`value` on the device of `like`, and in the same shards."""
    if isinstance(like.data, DTensor):
        return distribute_tensor(value.to(like.device), like.data.device_mesh, like.data.placements)
    return value.to(like.device)
