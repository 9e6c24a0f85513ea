"""What a trainer leaves on a shared card, and that it steps in its own turn only."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from training_rounds import commit_round, make_round, tiny_run
from waiting import until

from pipeline.live.card import Card
from pipeline.store.directory import Store, area
from pipeline.training import offload, rank
from pipeline.training.step import Trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Weights:
    """A model that knows where it is."""

    def __init__(self) -> None:
        self.device = CUDA

    def to(self, device: torch.device | str) -> None:
        """Move."""
        self.device = torch.device(device)


class OnACard:
    """A trainer on a card that no machine needs to have: its moments have a device and no memory."""

    def __init__(self, what: str) -> None:
        self.run = tiny_run("engines.rollout.colocate=true", f"train.offload={what}")
        self.device, self.student = CUDA, Weights()
        weight = torch.nn.Parameter(torch.empty(2, device=CUDA))
        self.optimizer = torch.optim.AdamW([weight])
        self.optimizer.state[weight] = {"step": torch.empty(()), "exp_avg": torch.empty(2, device=CUDA)}
        self.optimizer.state[weight]["exp_avg_sq"] = torch.empty(2, device=CUDA)

    def places(self) -> list[str]:
        """Where the weights are, the moments, and the step count."""
        [state] = self.optimizer.state.values()
        return [self.student.device.type, *(state[name].device.type for name in ("exp_avg", "exp_avg_sq", "step"))]


@pytest.mark.parametrize(
    ("what", "left"),
    [
        ("none", ["cuda", "cuda", "cuda", "cpu"]),
        ("optimizer", ["cuda", "cpu", "cpu", "cpu"]),
        ("all", ["cpu", "cpu", "cpu", "cpu"]),
    ],
)
def test_what_leaves_the_card_is_what_the_setting_names(what: str, left: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("unused memory"))
    with FakeTensorMode():
        trainer = OnACard(what)
        offload.leave(trainer)  # type: ignore[arg-type]
        assert trainer.places() == left
        assert freed == ["unused memory"]
        offload.come_back(trainer)  # type: ignore[arg-type]
        assert trainer.places() == ["cuda", "cuda", "cuda", "cpu"]


def test_a_rank_steps_while_it_holds_the_card_and_has_left_it_when_its_policy_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    engine, holders, store = Card("c"), [], Store(str(tmp_path / "run"))
    run = tiny_run("engines.rollout.colocate=true", "train.offload=all")
    steps, publish = Trainer.train_step, Store.publish_policy

    def watched_step(self: Trainer, *args: object) -> dict[str, float]:
        holders.append(("step", engine.take(within_s=0)))
        return steps(self, *args)  # type: ignore[arg-type]

    def watched_publish(self: Store, *args: object) -> None:
        holders.append(("publish", engine.take(within_s=0)))
        engine.release()
        publish(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "train_step", watched_step)
    monkeypatch.setattr(Store, "publish_policy", watched_publish)
    assert engine.take()
    for number in (0, 1):
        commit_round(store, make_round(number))
    thread = threading.Thread(target=rank.train, args=(store, run, CPU, Card("c")))
    thread.start()
    thread.join(1)
    assert holders == []  # both rounds are committed, and the engine still has the card
    engine.release()
    until(lambda: store.has_policy(2), what="both rounds are trained")
    thread.join(300)
    assert holders == [("step", False)] * 2 + [("publish", True)] + [("step", False)] * 2 + [("publish", True)]

    monkeypatch.setattr(Trainer, "train_step", steps)
    monkeypatch.setattr(Store, "publish_policy", publish)
    straight = Store(str(tmp_path / "straight"))
    for number in (0, 1):
        commit_round(straight, make_round(number))
    rank.train(straight, tiny_run(), CPU)
    for folder in (area("policy", 2), area("train", 2)):
        assert store.read_json(f"{folder}/manifest.json") == straight.read_json(f"{folder}/manifest.json")


def test_a_stop_ends_a_rank_that_waits_for_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    engine, store, run = Card("c"), Store(str(tmp_path / "run")), tiny_run("engines.rollout.colocate=true")
    commit_round(store, make_round())
    trainer = rank.resume(store, run, CPU)
    assert engine.take()
    store.request_stop()
    assert rank.train_round(trainer, store, 0, Card("c")) is False
    rank.train(store, run, CPU, Card("c"))
    assert store.latest_policy() == 0
