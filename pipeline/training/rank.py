"""The work of one rank: resume from the latest policy, wait for rounds, train each one and publish its policy.

Ray Train starts the ranks (worker.py). This module does not use Ray, so it also runs in a process of its own.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from torch import distributed as dist

from pipeline.config import Run
from pipeline.errors import StoreError, TrainingError
from pipeline.live.card import Card
from pipeline.rounds.rows import is_comparable, shard_tables
from pipeline.store import owner
from pipeline.store.directory import Store, area
from pipeline.store.files import NO_SPACE
from pipeline.store.folders import ADAPTER, is_dropped, put_folder
from pipeline.training import checkpoint, memory, offload
from pipeline.training.agreement import base_model, teachers
from pipeline.training.step import Trainer
from pipeline.training.stored import StoredRound
from pipeline.training.student import student, whole

T = TypeVar("T")
log = logging.getLogger(__name__)
PATIENCE_S = 10.0  # waiting ranks exchange a message at least this often, far below the timeout of a collective


def train(store: Store, run: Run, device: torch.device, card: Card | None = None) -> None:
    """Build the model once, then train each round as it is committed, until the run is complete or a stop is requested.

    card: the one that this rank shares with an engine. The rank uses it while it holds it, and otherwise leaves it.
    """
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    with memory.explained(run, device):
        with _turn(card, store) as mine:
            if not mine:
                return
            trainer = resume(store, run, device)
            if card is not None:
                offload.leave(trainer)
        if trainer.rank == 0:  # a rank that was killed after it published a policy had no time to drop what is older
            store.prune_states(run.train.keep_checkpoints)
        # a driver waits for these before it pays for round 0; `egrsd train` begins with a committed round, and has no engines
        if first_rank(lambda: store.latest_policy() == 0 and store.ready(0) is None):
            if base_model.is_asked(run):
                tell_base(trainer, store)
            if trainer.rank == 0:
                teachers.tell(run, store)
        for number in range(first_rank(store.latest_policy), run.rounds):
            if not wait(store, number) or not train_round(trainer, store, number, card):
                return


def resume(store: Store, run: Run, device: torch.device) -> Trainer:
    """A trainer in the state in which the latest published policy was trained, or a new trainer before the first policy.

    With `train.checkpoint_every` above 1 the last state may be older. The rounds after it are then trained again.

    Raises TrainingError when no state is near enough, ModelError when it does not fit the run.
    """
    version = first_rank(store.latest_policy)
    kept = first_rank(lambda: max((n for n in [0, *store.numbers("train")] if n <= version and store.has_state(n)), default=0))
    if version - kept >= run.train.checkpoint_every:
        remedy = "Delete that policy to go back to the one before"
        raise TrainingError(f"policy {version} has no training state", store.locate("train"), remedy)
    model = student.build(run, device)
    if kept == 0:
        trainer = Trainer(run, model, device)
    else:
        with store.local(area("train", kept)) as folder:
            if folder is None:
                raise TrainingError(f"policy {kept} has no training state", store.locate("train"))
            checkpoint.load_policy(model, folder, run.model)
            trainer = Trainer(run, model, device)
            checkpoint.load_optimizer(trainer, folder)
    for number in range(kept, version):
        list(trainer.train_round(_round(trainer, store, number)))
    if kept < version:
        _compare(trainer, store, version)
    return trainer


def _compare(trainer: Trainer, store: Store, version: int) -> None:
    """Tell by how much a policy that was trained again differs from the published one. On a CPU it does not."""
    adapter = checkpoint.gather(trainer)
    if trainer.rank != 0:
        return
    with store.local(area("policy", version)) as published, tempfile.TemporaryDirectory(dir=store.scratch()) as scratch:
        checkpoint.save_policy(trainer, adapter, Path(scratch))
        gap = checkpoint.distance(Path(scratch), published) if published is not None else float("nan")
    level = logging.INFO if gap == 0 else logging.WARNING
    log.log(level, "policy %d was trained again: its weights differ from the published ones by at most %.2g", version, gap)


def tell_base(trainer: Trainer, store: Store) -> None:
    """Write what the base answers, alone and with random adapters. The driver compares that with an engine before round 0.

    Every rank must call this.
    """
    run, student = trainer.run, trainer.student
    told: dict[str, Any] = {
        "tokens": whole.sequence(student.vocab_size, run.model.max_model_len),
        "logprobs": student.base_answers,
    }
    if run.model.tuning == "lora":
        told["adapted"] = [_tell_adapted(trainer, store, target) for target in checkpoint.targets(trainer)]
    if trainer.rank == 0:
        store.write_json(base_model.FILE, told)


def _tell_adapted(trainer: Trainer, store: Store, target: str) -> dict[str, Any]:
    """Write a random adapter of one target. What the base answers with it, once that differs enough for half precision."""
    for times in (1, 2, 4, 8, 16, 32):
        with checkpoint.shaken(trainer, target, times):
            logprobs, adapter = checkpoint.probe(trainer).logprobs, checkpoint.gather(trainer)
        moved = float(np.abs(np.subtract(logprobs, trainer.student.base_answers)).mean())
        if first_rank(partial(bool, moved >= base_model.MOVED)):
            break
    if trainer.rank == 0:
        with tempfile.TemporaryDirectory(prefix=owner.mark(), dir=store.scratch()) as scratch:
            checkpoint.save_policy(trainer, adapter, Path(scratch))
            put_folder(store, f"{base_model.ADAPTER}/{target}", Path(scratch))
    return {"target": target, "logprobs": logprobs}


def wait(store: Store, number: int) -> bool:
    """Wait until round `number` is committed (True) or a stop is requested (False). All ranks get the same answer."""
    while True:
        state = first_rank(lambda: _watch(store, number))
        if state is not None:
            return state == "ready"


def train_round(trainer: Trainer, store: Store, number: int, card: Card | None = None) -> bool:
    """Train a committed round and publish policy `number + 1`. Returns False, with nothing published, when a stop came first.

    A `card` that is shared with an engine is left before the policy is published. The driver wakes the engine after that.

    The state is saved before the policy is published, and older states are deleted afterwards. The latest published policy
    therefore always has a state to resume from, at most `train.checkpoint_every` - 1 rounds before it. A round that was cut short
    is trained again from the policy before it, and ends with the same weights.
    """
    train = trainer.run.train
    keeps = (number + 1) % train.checkpoint_every == 0 or number + 1 == trainer.run.rounds
    with tempfile.TemporaryDirectory(prefix=owner.mark(), dir=store.scratch()) as scratch:
        state, policy = Path(scratch) / "state", Path(scratch) / "policy"
        with _turn(card, store) as mine:
            if card is not None and mine:
                offload.come_back(trainer)
            metrics = _steps(trainer, store, number) if mine else None
            if metrics is None:
                return False
            _write(trainer, number + 1, policy, state if keeps else None)
            if card is not None:
                offload.leave(trainer)
        if trainer.rank == 0:
            store.append_metrics(metrics)
            if keeps:
                store.save_state(number + 1, state)
            store.publish_policy(number + 1, policy)
            store.prune_states(train.keep_checkpoints)
            store.prune_policies(trainer.run.kept_policies)
    return True


def _turn(card: Card | None, store: Store) -> AbstractContextManager[bool]:
    """A block in which this rank may use its device: at once, or while it holds the shared card. False when a stop came first."""
    return nullcontext(True) if card is None else card.held(store.stop_requested, store.poll_s)


def _steps(trainer: Trainer, store: Store, number: int) -> list[dict[str, float]] | None:
    """The metrics of a round's optimiser steps, or None when a stop was requested in between."""
    metrics = []
    for row in trainer.train_round(_round(trainer, store, number)):
        metrics.append(row)
        if first_rank(store.stop_requested):
            return None
    return metrics


def _round(trainer: Trainer, store: Store, number: int) -> StoredRound:
    """The rows of a committed round, with what the objective reads. Raises TrainingError when it is gone."""
    ready = store.ready(number)
    if ready is None:
        raise TrainingError("the round was committed and is gone", store.locate(f"rounds/{number:04d}"))
    shards = partial(shard_tables, store, number, ready, trainer.run.objective.columns)
    data = StoredRound(number, ready.policy, shards, store.scratch(), is_comparable(store, number))
    if ready.policy == number or not data.comparable:
        return data
    answered = _weights_of(trainer, store, ready.policy)
    return replace(data, comparable=answered is not None, answered=answered)


def _weights_of(trainer: Trainer, store: Store, version: int) -> dict[str, torch.Tensor] | None:
    """The published weights of a policy, by the names of the trained ones, and None where they are gone.

    An adapter of policy 0 is empty. Whole weights are read in the dtype of engines. Where they are sharded, rank 0 deals them,
    and the others get none.
    """
    run, whole_model = trainer.run, trainer.student.trains_all
    if not first_rank(lambda: store.has_policy(version) and not is_dropped(store, area("policy", version))):
        return None
    if version == 0 and not whole_model:
        return {}
    if whole_model and trainer.rank != 0 and run.train.strategy == "fsdp2":
        return {}
    dtype = getattr(torch, run.model.dtype)
    if version == 0:
        return checkpoint.whole_weights(trainer.student, run.model, dtype)
    with store.local(area("policy", version)) as folder:
        assert folder is not None  # has_policy
        if not whole_model:
            return checkpoint.tensors(folder / ADAPTER)
        return checkpoint.whole_weights(trainer.student, whole.at(run.model, folder), dtype)


def _write(trainer: Trainer, version: int, policy: Path, state: Path | None) -> None:
    """Write the policy of `version` into one folder, and its training state into another. Only rank 0 writes.

    Raises StoreError when the disk is full, because every other attempt would fail as well.
    """
    try:
        adapter = checkpoint.gather(trainer)
        if state is not None:
            checkpoint.save(trainer, version, adapter, state)
        probe = checkpoint.probe(trainer) if trainer.student.trains_all else None
        if trainer.rank == 0:
            checkpoint.save_policy(trainer, adapter, policy)
        if trainer.rank == 0 and probe is not None:
            (policy / whole.PROBE).write_text(probe.model_dump_json())
    except (OSError, SafetensorError) as error:
        raise StoreError(f"cannot write the training state ({error})", str(policy.parent), NO_SPACE) from error


def first_rank(ask: Callable[[], T]) -> T:
    """The result of `ask` on rank 0, sent to every rank. Ranks that each read the store could see different states of it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ask()
    answer = [ask() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]  # type: ignore[return-value]


def _watch(store: Store, number: int) -> str | None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if store.stop_requested():
            return "stop"
        if store.ready(number) is not None:
            return "ready"
        time.sleep(store.poll_s)
    return None
