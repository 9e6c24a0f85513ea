"""Trainers and settings that several tests of the optimiser step share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.config import Run
from pipeline.config.objective import OBJECTIVES
from pipeline.training import batches
from pipeline.training.batches import RoundTable
from pipeline.training.step import Trainer
from pipeline.training.student import student
from pipeline.training.student.head import Terms

CPU = torch.device("cpu")
CONTROLS = ("shuffled", "uniform", "inverted")
ONE_STEP = ("train.batch_traces=12", "train.micro_batch_tokens=90")
KEPT = "score.keep_topk=20"
EVERY = {name: (f"objective.name={name}", KEPT) for name in OBJECTIVES if name != "sft"}
EVERY["sft"] = ("objective.name=sft", "rollout.teacher_share=0.5")
EVERY |= {
    f"gkd {beta} {s}": (*EVERY["gkd"], f"objective.gkd_beta={beta}", f"objective.support={s}")
    for beta, s in ((0, "truncated"), (1, "renormalised"))
}
EVERY |= {f"opd {gate}": ("objective.name=opd", f"objective.gate={gate}") for gate in ("entropy", "top_entropy:0.3")}
EVERY |= {f"fkl {c}": (*EVERY["fkl"], "objective.gate=cl_entropy", f"objective.control={c}") for c in ("shuffled", "uniform")}
EVERY["top inverted"] = ("objective.name=grpo", "objective.gate=top_entropy:0.4", "objective.control=inverted")
EVERY |= {clip: ("objective.name=egrsd", f"objective.clip={clip}") for clip in ("ppo", "gspo", "cispo")}
EVERY |= {c: (*EVERY["fkl"], f"objective.correction={c}") for c in ("token", "sequence")}
EVERY["kl"] = ("objective.kl=0.3", "score.base_logprobs=true")
EVERY |= {f"norm {norm}": (*EVERY["eopd"], f"objective.normalise={norm}") for norm in ("sequence", "constant")}


def trainer(run: Run) -> Trainer:
    """A trainer whose adapter is not the identity, so that every gradient is alive."""
    model = student.build(run, CPU)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return Trainer(run, model, CPU)


def trained(run: Run, data: RoundTable) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    made = trainer(run)
    return list(made.train_round(data)), {name: p.detach().clone() for name, p in made.parameters().items()}


def gradient_of(run: Run, data: RoundTable) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and clipped gradient of a round of one step, read back from Adam's first moment. Weights would not compare: Adam
    turns the rounding of a gradient near zero into a whole step."""
    made = trainer(run)
    (metrics,) = made.train_round(data)
    moments = {name: made.optimizer.state[p]["exp_avg"] / (1 - run.train.betas[0]) for name, p in made.parameters().items()}
    return metrics, moments


def same(metrics: dict[str, float], others: dict[str, float], tolerance: float) -> None:
    """All but the clock, and what was computed of padding."""
    assert metrics.keys() == others.keys()
    for name in metrics.keys() - {"seconds", "tokens_per_s", "padded_share", "shared_share"}:
        assert metrics[name] == pytest.approx(others[name], rel=tolerance, abs=tolerance), name


def engine_logprobs(made: Trainer, data: RoundTable) -> list[list[float]]:
    """What an engine with the trainer's weights would store."""
    traces, found = batches.usable(data, 0), []
    for row in range(len(traces.trace_ids)):
        micro = batches.micro_batch(traces, np.array([row]))
        with torch.no_grad():
            found.append(
                made.student(micro.tokens, micro.sources, Terms(micro.targets, torch.zeros(len(micro.targets))))[1].tolist()
            )
    return found
