"""A rank that runs out of memory says what it needs and what to lower. Errors of the CPU are torch's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_rounds import commit_round, make_round, tiny_run

from pipeline.errors import TrainingError
from pipeline.fit import footprint
from pipeline.store.directory import Store
from pipeline.training import memory, rank
from pipeline.training.step import Trainer

CPU = torch.device("cpu")
SHORT = ("model.max_model_len=2", "train.micro_batch_tokens=2", "rollout.max_new_tokens=1", "evaluation.max_new_tokens=1")


def test_memory_that_torch_does_not_get_is_told_with_the_arithmetic_of_a_rank() -> None:
    run = tiny_run("train.micro_batch_tokens=4096")
    parts = footprint.rank_bytes(run, footprint.measure(run.model))
    with pytest.raises(TrainingError) as told, memory.explained(run, CPU):
        torch.empty(2**50)
    assert "can't allocate memory: you tried to allocate 4503599627370496 bytes" in told.value.what
    assert f"A rank needs {footprint.summed(parts)}" in told.value.what
    assert told.value.remedy == "Lower train.micro_batch_tokens (now 4096), or set train.gradient_checkpointing true"


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (["train.micro_batch_tokens=64"], r"Lower model\.max_model_len \(now 256; a micro-batch holds a whole trace\), or set"),
        (["train.head_chunk_tokens=1000000", "train.placement.gpus=1"], r"Lower train\.head_chunk_tokens \(now 1000000\)"),
        (
            [
                "model.lora_rank=512",
                "train.micro_batch_tokens=256",
                "train.gradient_checkpointing=true",
                "train.head_chunk_tokens=1",
            ],
            r"Lower model\.lora_rank \(now 512\)",
        ),
        (
            ["model.tuning=full", "train.strategy=fsdp2", "train.workers=64", "train.head_chunk_tokens=1", *SHORT],
            "Each card holds the whole model at the start: use larger cards",
        ),
        (
            ["model.tuning=full", "train.strategy=fsdp2", "train.workers=2", "train.head_chunk_tokens=1", *SHORT],
            r"Set model\.tuning lora, or raise train\.workers \(now 2\)$",
        ),
        (
            ["train.gradient_checkpointing=true", "train.micro_batch_tokens=9000"],
            r"Lower train\.micro_batch_tokens \(now 9000\)$",
        ),
    ],
)
def test_the_setting_that_is_named_is_that_of_the_largest_part(settings: list[str], remedy: str) -> None:
    with pytest.raises(TrainingError, match=remedy), memory.explained(tiny_run(*settings), CPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), memory.explained(tiny_run(), CPU):
        raise RuntimeError("shapes differ")


def test_a_step_without_memory_ends_a_rank_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    commit_round(store, make_round())
    monkeypatch.setattr(Trainer, "train_step", lambda *_: torch.empty(2**50))
    with pytest.raises(TrainingError, match=r"^train: out of memory .* A rank needs weights .* GiB\. Lower train\.micro_batch"):
        rank.train(store, tiny_run("train.micro_batch_tokens=4096"), CPU)
