"""What one rank does with a real run directory: resume, wait, train, publish. In the test's process, without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_rounds import commit_round, make_round, tiny_run

from pipeline.errors import StoreError, TrainingError
from pipeline.store.directory import Store, area
from pipeline.training import rank


def test_a_stop_ends_a_trainer_that_waits_and_a_round_in_hand_is_left_whole(tmp_path: Path) -> None:
    store, run = Store(str(tmp_path)), tiny_run()
    store.request_stop()
    assert rank.wait(store, 0) is False
    commit_round(store, make_round())
    assert rank.train_round(rank.resume(store, run, torch.device("cpu")), store, 0) is False
    assert store.latest_policy() == 0
    store.request_stop(False)
    assert rank.wait(store, 0) is True


def test_states_are_dropped_only_once_a_newer_policy_is_published(tmp_path: Path) -> None:
    store, run = Store(str(tmp_path)), tiny_run()
    trainer = rank.resume(store, run, torch.device("cpu"))
    for number in (0, 1, 2):
        commit_round(store, make_round(number))
    for number in (0, 1):
        assert rank.train_round(trainer, store, number)
    blocked = tmp_path / "policy/0003"
    blocked.write_text("a file where the policy's folder belongs")
    with pytest.raises(StoreError):
        rank.train_round(trainer, store, 2)
    assert store.numbers("train") == [1, 2, 3]
    blocked.unlink()
    resumed = rank.resume(store, run, torch.device("cpu"))
    assert rank.train_round(resumed, store, 2)
    assert store.numbers("train") == [2, 3]


def test_a_policy_without_its_state_is_not_trained_on(tmp_path: Path) -> None:
    store, run = Store(str(tmp_path)), tiny_run()
    commit_round(store, make_round())
    assert rank.train_round(rank.resume(store, run, torch.device("cpu")), store, 0)
    store.delete(area("train", 1))
    with pytest.raises(TrainingError, match="policy 1 has no training state"):
        rank.resume(store, run, torch.device("cpu"))
