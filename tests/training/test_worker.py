"""The trainer beside its driver, on real Ray Train workers and a real run directory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import waiting
from ray.exceptions import OutOfMemoryError
from torch import distributed as dist
from training_rounds import commit_round, make_round, tiny_run
from waiting import below

from pipeline import notices
from pipeline.errors import TrainingError
from pipeline.overrides import resolve
from pipeline.store.directory import Store, area
from pipeline.training import leaders, rank, worker


def until(done: Callable[[], bool], handle: worker.Handle) -> None:
    """Wait until it is `done`. An error of the trainer is raised."""
    waiting.until(lambda: done() or handle.join(timeout=0), what="the trainer")


def ranks() -> list[int]:
    """The processes of Ray Train's ranks, below this process's own Ray."""
    return [process.pid for process in below("RayTrainWorker")]


def rank_pid() -> int:
    """The process of the one rank."""
    [pid] = ranks()
    return pid


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.chaos)])
def test_a_killed_rank_resumes_and_ends_in_the_same_weights(tmp_path: Path, kills: int) -> None:
    alone = tiny_run("rounds=4", "train.threads=1", "train.max_failures=1")
    run = resolve(alone, ["engines.rollout.colocate=true", "train.offload=all"])  # a card in turns changes no bit
    store = Store(str(tmp_path / "run"))
    handle = worker.start(store.uri, run)
    for number in (0, 1):
        commit_round(store, make_round(number))
    until(lambda: store.has_policy(2), handle)
    os.kill(rank_pid(), signal.SIGKILL)
    commit_round(store, make_round(2))
    until(lambda: store.has_policy(3) and store.numbers("train") == [2, 3], handle)  # older states go after the policy is there
    if kills == 2:
        os.kill(rank_pid(), signal.SIGKILL)  # once more than max_failures, but the run got on in between

    straight = Store(str(tmp_path / "straight"))
    trainer = rank.resume(straight, alone, torch.device("cpu"))
    for number in (0, 1, 2):
        commit_round(straight, make_round(number))
        assert rank.train_round(trainer, straight, number)
    for folder in (area("policy", 3), area("train", 3)):
        assert store.read_json(f"{folder}/manifest.json") == straight.read_json(f"{folder}/manifest.json")
    assert [row["step"] for row in store.metrics()] == list(range(6))
    until(lambda: store.numbers("train") == [2, 3], handle)  # keep_checkpoints, whenever the last kill came

    commit_round(store, make_round(3, policy_version=[2] * 12))
    with pytest.raises(TrainingError, match="older than max_staleness"):
        until(lambda: store.has_policy(4), handle)
    with pytest.raises(TrainingError, match="older than max_staleness"):
        handle.join()
    assert store.latest_policy() == 3
    assert store.names("train") == ["0002", "0003"]  # Ray Train left nothing


@pytest.mark.chaos
@pytest.mark.usefixtures("ray_local")
def test_a_stopped_rank_is_replaced_and_ends_in_the_same_weights(tmp_path: Path) -> None:
    run = tiny_run("rounds=2", "train.threads=1", "train.stall_timeout_s=10", "train.max_failures=1")
    store, told = Store(str(tmp_path / "run")), []
    with notices.shown(told.append):
        handle = worker.start(store.uri, run)
        commit_round(store, make_round(0))
        until(lambda: store.has_policy(1), handle)
        stopped = rank_pid()
        os.kill(stopped, signal.SIGSTOP)
        commit_round(store, make_round(1))
        until(lambda: store.has_policy(2), handle)
        handle.join(300)
    assert not psutil.pid_exists(stopped)
    assert told[-1] == "training: a worker group ended (a rank gave no sign of life). It goes on from policy 1."
    assert [text for text in told[:-1] if "RayTrainWorker" not in text] == []  # a slow machine ends it before Ray Train does

    straight = Store(str(tmp_path / "straight"))
    trainer = rank.resume(straight, run, torch.device("cpu"))
    for number in (0, 1):
        commit_round(straight, make_round(number))
        assert rank.train_round(trainer, straight, number)
    assert store.read_json("policy/0002/manifest.json") == straight.read_json("policy/0002/manifest.json")


@pytest.mark.chaos
@pytest.mark.usefixtures("ray_local")
def test_a_rank_that_stops_while_its_group_starts_is_replaced(tmp_path: Path) -> None:
    """Ray Train waits for a starting rank without a deadline, so this run used to wait for ever."""
    run = tiny_run("rounds=1", "train.threads=1", "train.stall_timeout_s=5", "train.max_failures=1")
    store = Store(str(tmp_path / "run"))
    handle = worker.start(store.uri, run)
    until(lambda: bool(ranks()), handle)
    [stopped] = ranks()
    os.kill(stopped, signal.SIGSTOP)
    commit_round(store, make_round(0))
    until(lambda: store.has_policy(1), handle)
    handle.join(300)
    assert not psutil.pid_exists(stopped)


def test_ranks_wait_for_one_that_writes_a_large_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of 177 GB takes longer than the half an hour after which all ranks ended, at every try again.

    They wait a day once they have met. Ranks that do not reach each other at the start fail after Ray's half an hour.
    """
    asked = []
    monkeypatch.setattr(worker, "TorchTrainer", lambda *_, torch_config, **__: asked.append(torch_config.timeout_s))
    monkeypatch.setattr(worker.os, "environ", dict(os.environ))
    worker._trainer(Store(str(tmp_path)), tiny_run())
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", asked.append)
    monkeypatch.setattr(rank, "train", lambda *_: asked.append("trains"))
    worker.train_loop({"store": Store(str(tmp_path)), "run": tiny_run().model_dump(mode="json"), "card": None})
    assert asked == [1800, timedelta(days=1), "trains"]


@pytest.mark.usefixtures("ray_local")
def test_a_trainer_without_room_is_given_up_and_does_not_try_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "4")
    store = Store(str(tmp_path))
    store.request_stop()  # of a trainer before
    handle = worker.start(store.uri, tiny_run("train.placement.cpus=1000", "train.max_failures=1"))
    handle.join(timeout=1)
    assert handle.running()
    assert not store.stop_requested()
    begun = time.monotonic()
    assert handle.stop(timeout=1) is False
    assert time.monotonic() - begun < 120
    assert store.stop_requested()  # for workers that start after all
    handle.join(timeout=300)  # Ray starts three processes first, at a low priority
    assert not handle.running()
    assert handle.stop(timeout=1) is True
    assert not store.stop_requested()


@pytest.mark.usefixtures("ray_local")
def test_ranks_that_find_no_room_end_the_trainer_after_one_deadline_and_name_what_they_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train tried four times in each of four calls of fit(): with its default deadline eight hours of idle cards."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "6")
    begun = time.monotonic()
    with pytest.raises(TrainingError) as told:
        worker.fit(Store(str(tmp_path)), tiny_run("train.placement.cpus=1000", "train.max_failures=3"))
    assert time.monotonic() - begun < 4 * 4 * 6
    assert str(told.value).startswith(
        "train.placement, policy 0: the ranks found no room within 6 s. They ask for 1 x (1000 CPU). Add nodes"
    )


class EndedForMemory:
    """Stands for Ray Train, whose controller Ray's memory monitor ends with an error of its own kind."""

    def __init__(self, *pages: str) -> None:
        self.pages = list(pages)

    def fit(self) -> None:
        """Raise the next error, until none is left."""
        if self.pages:
            raise OutOfMemoryError(self.pages.pop(0))


@pytest.mark.usefixtures("ray_local")
def test_a_controller_that_is_ended_for_memory_is_replaced_and_told_in_one_short_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, said = "7 worker(s) were killed. " + "statistics, " * 500, []
    ended = EndedForMemory(page)
    monkeypatch.setattr(worker, "_trainer", lambda store, run: ended)
    with notices.shown(said.append):
        worker.fit(Store(str(tmp_path)), tiny_run())
    assert said == [
        "training: a worker group ended (memory ran out, and Ray ended Ray Train's controller). It goes on from policy 0."
    ]
    ended.pages = [page] * 2
    with pytest.raises(TrainingError, match="memory ran out") as told:
        worker.fit(Store(str(tmp_path)), tiny_run("train.max_failures=1"))
    assert len(str(told.value)) < 400


@pytest.mark.chaos
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_controller_that_stops_or_dies_is_replaced_and_training_ends_in_the_same_weights(tmp_path: Path, how: int) -> None:
    run = tiny_run("rounds=2", "train.threads=1", "train.stall_timeout_s=10", "train.max_failures=1")
    store, told = Store(str(tmp_path / "run")), []
    with notices.shown(told.append):
        handle = worker.start(store.uri, run)
        commit_round(store, make_round(0))
        until(lambda: store.has_policy(1), handle)
        [controller] = [process for process, name in leaders.leaders().items() if name == "TrainController"]
        controller.send_signal(how)
        until(lambda: not controller.is_running() or controller.status() == psutil.STATUS_ZOMBIE, handle)
        commit_round(store, make_round(1))
        until(lambda: store.has_policy(2), handle)
        handle.join(300)
    assert not handle.running()
    who = f"training: Ray Train's TrainController (process {controller.pid}) did nothing for "
    assert [text.startswith(who) for text in told[:-1]] == ([True] if how == signal.SIGSTOP else [])
    assert told[-1] == "training: a worker group ended (Ray Train's controller died). It goes on from policy 1."
    until(lambda: not leaders.leaders(), handle)

    straight = Store(str(tmp_path / "straight"))
    trainer = rank.resume(straight, run, torch.device("cpu"))
    for number in (0, 1):
        commit_round(straight, make_round(number))
        assert rank.train_round(trainer, straight, number)
    assert store.read_json("policy/0002/manifest.json") == straight.read_json("policy/0002/manifest.json")
