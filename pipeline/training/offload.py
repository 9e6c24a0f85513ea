"""What a trainer leaves on a card that it shares with an engine: `train.offload` says what goes off it in the engine's turn."""

from __future__ import annotations

import gc

import torch

from pipeline.training.step import Trainer


def leave(trainer: Trainer) -> None:
    """Move off the card what `train.offload` names, and give the memory back that torch keeps for itself."""
    offload = trainer.run.train.offload
    if offload != "none":
        _move(trainer.optimizer, torch.device("cpu"))
    if offload == "all":
        trainer.student.to("cpu")
    if trainer.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def come_back(trainer: Trainer) -> None:
    """Put everything that a step needs onto the trainer's device again. The numbers are the same bits as before."""
    trainer.student.to(trainer.device)
    _move(trainer.optimizer, trainer.device)


def _move(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move the moments of every parameter. The step count is a number that stays on the CPU."""
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name] = state[name].to(device)
