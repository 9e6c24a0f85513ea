"""The step on two ranks, replicated and sharded, is that of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packed_round import shared_round
from steps import CONTROLS, EVERY, same, trainer
from torch import multiprocessing
from training_rounds import make_round, tiny_run

from pipeline.config.objective import OBJECTIVES
from pipeline.models.resolve import asset_path
from pipeline.store.directory import Store
from pipeline.training import batches
from pipeline.training.agreement import base_model
from pipeline.training.batches import RoundTable
from pipeline.training.step import Trainer
from pipeline.training.student import student

ALL = batches.SILENT  # tokens times weights from which silent traces have passes of their own
RANKED = {case: EVERY[case] for case in (*OBJECTIVES, "opd top_entropy:0.3", "norm sequence", "gspo", "kl")}
RANKED |= {control: (f"objective.control={control}",) for control in CONTROLS}
RANKED |= {f"silent {n} {s}": (f"train.strategy={s}",) for n in (7, 13) for s in ("ddp", "fsdp2")}
RANKED["silent 7 packed"] = ("train.strategy=fsdp2", "train.packing=packed")
RANKED["silent 7 whole"] = ("train.strategy=fsdp2", "model.tuning=full", "train.learning_rate=0.001")
RANKED |= {f"packed {s}": ("train.packing=packed", f"train.strategy={s}") for s in ("ddp", "fsdp2")}


def round_of(case: str) -> RoundTable:
    """The round of a case. In the silent ones so many traces have no advantage."""
    if "silent" in case:
        return make_round(num_traces=13, advantage=[0.0] * int(case.split()[1]) + [0.5] * (13 - int(case.split()[1])))
    return shared_round() if "packed" in case else make_round(num_traces=13)


def rank_main(rank: int, ranks: int, folder: str) -> None:
    """Train one round with DDP and one with FSDP2 and leave what came out in `folder`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    from pipeline.training import checkpoint
    from pipeline.training import rank as ranks_work

    for strategy in ("ddp", "fsdp2"):
        run = tiny_run(f"model.path={asset_path()}", f"train.strategy={strategy}")
        made = Trainer(run, student.build(run, torch.device("cpu")), torch.device("cpu"))
        ranks_work.tell_base(made, Store(str(Path(folder, "base", strategy))))
        assert not any(part.any() for name, part in checkpoint.gather(made).items() if "lora_B" in name)
        for dtype in ("float32", "bfloat16"):
            made = trainer(tiny_run("train.batch_traces=13", f"train.strategy={strategy}", f"train.dtype={dtype}"))
            metrics = list(made.train_round(make_round(num_traces=13)))
            checkpoint.save(made, 1, checkpoint.gather(made), Path(folder, strategy, dtype))
            metrics += made.train_round(make_round(1, num_traces=13))
            if rank == 0:
                torch.save(metrics, Path(folder, strategy, dtype, "metrics.pt"))
    for case, settings in RANKED.items():
        batches.SILENT = 0 if "silent" in case else ALL
        made = trainer(tiny_run("train.batch_traces=13", *settings))
        metrics = list(made.train_round(round_of(case)))
        if "silent" in case:  # a pass without a backward one must leave no stale weights
            metrics += made.train_round(make_round(1, num_traces=13))
        if rank == 0:
            torch.save(metrics, Path(folder, f"{case}.pt"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(rank_main, (2, str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_equal_one(two_ranks: Path, strategy: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from pipeline.training import checkpoint

    alone = trainer(tiny_run("train.batch_traces=13"))
    metrics = list(alone.train_round(make_round(num_traces=13)))
    checkpoint.save(alone, 1, checkpoint.gather(alone), tmp_path)
    metrics += alone.train_round(make_round(1, num_traces=13))
    for a, b in zip(metrics, torch.load(two_ranks / strategy / "float32" / "metrics.pt"), strict=True):
        same(a, b, 1e-3)
    one, two = (load_file(folder / checkpoint.OPTIMIZER) for folder in (tmp_path, two_ranks / strategy / "float32"))
    assert one.keys() == two.keys()
    for name in [name for name in one if name.endswith("exp_avg")]:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=1e-3)
    adapters = [load_file(folder / checkpoint.ADAPTER) for folder in (tmp_path, two_ranks / strategy / "float32")]
    assert {n: t.shape for n, t in adapters[0].items()} == {n: t.shape for n, t in adapters[1].items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_what_the_base_answers_with_a_random_adapter_is_the_same_on_one_rank(two_ranks: Path, strategy: str) -> None:
    from pipeline.training import checkpoint

    told = Store(str(two_ranks / "base" / strategy)).read_document(base_model.FILE, base_model.Answered)
    assert told is not None
    run = tiny_run(f"model.path={asset_path()}")
    alone = Trainer(run, student.build(run, torch.device("cpu")), torch.device("cpu"))
    assert checkpoint.probe(alone).logprobs == pytest.approx(told.logprobs, abs=1e-5)
    for one in told.adapted:
        checkpoint.load_adapter(alone.student, two_ranks / "base" / strategy / base_model.ADAPTER / one.target, run.model)
        assert checkpoint.probe(alone).logprobs == pytest.approx(one.logprobs, abs=1e-4)


@pytest.mark.parametrize("case", RANKED)
def test_objectives_and_controls_are_the_same_on_two_ranks(two_ranks: Path, case: str) -> None:
    made = trainer(tiny_run("train.batch_traces=13", *RANKED[case]))
    alone = list(made.train_round(round_of(case)))
    if "silent" in case:
        alone += made.train_round(make_round(1, num_traces=13))
    together = torch.load(two_ranks / f"{case}.pt")
    assert len(alone) == len(together) > 0
    for a, b in zip(alone, together, strict=True):
        same(a, b, 1e-3)


def test_a_bfloat16_base_trains_sharded_as_replicated(two_ranks: Path) -> None:
    ddp, sharded = (torch.load(two_ranks / strategy / "bfloat16" / "metrics.pt") for strategy in ("ddp", "fsdp2"))
    for a, b in zip(ddp, sharded, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05, abs=0.05)
