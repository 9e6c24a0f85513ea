"""Data tasks that have stopped: they use no processor time. Busy, idle, traced and starved ones are left alone."""

import math
import os
import shutil
import signal
import subprocess

import psutil
import pytest
import ray
from waiting import until

from pipeline import notices
from pipeline.rounds.running import frozen
from pipeline.rounds.running.frozen import Frozen, Watch

A, B = ("here", 1, 0.5, True), ("here", 2, 0.5, True)


def test_only_time_without_processor_time_counts():
    state = Frozen()
    for used in ({A: 1.0, B: 1.0}, {A: 1.0, B: 1.01}, {A: 1.0, B: 1.02}):
        state.update(used, 5.0)
    assert state.still == {A: 10.0}
    state.update({A: 1.01, B: 1.03}, 5.0)
    assert state.still == {}


def test_a_process_that_runs_or_is_traced_is_alive_whatever_its_time():
    state = Frozen()
    for _ in range(3):
        state.update({A: math.inf}, 60.0)
    assert state.still == {}


def test_another_process_with_the_same_number_begins_anew():
    state = Frozen()
    for place in (A, A, ("here", 1, 9.5, True)):
        state.update({place: 1.0}, 60.0)
    assert state.still == {}


@pytest.fixture
def worker(request):
    """A process that has the title of a Ray worker and waits."""
    title = "ray::IDLE a_mark" if "idle" in request.node.name else "ray::MapBatches(a_mark)"
    process = subprocess.Popen([title, "600"], executable=shutil.which("sleep"))
    until(lambda: any(place[3] for place in frozen.here("a_mark")))
    yield process
    process.kill()
    process.wait()


def test_a_stopped_process_is_seen_ended_and_told_of(worker):
    [place] = [place for place in frozen.here("a_mark") if place[3]]
    assert place[1] == worker.pid
    assert not [place for place in frozen.here("another mark") if place[3]]
    os.kill(worker.pid, signal.SIGSTOP)
    said = []
    with notices.shown(said.append), Watch("a_mark", 0.4, frozen.here, frozen.end_here):
        assert worker.wait(300) == -signal.SIGKILL
    assert f"a data task (process {worker.pid} on {place[0]}) did nothing for" in said[0]


def test_an_idle_worker_is_left_alone_until_it_is_stopped(worker):
    """It has no work to be done again. One of another Ray is never looked at: its parent names another session."""

    def used():
        return next(used for place, used in frozen.here("another mark", "pytest").items() if place[1] == worker.pid)

    assert used() == math.inf
    os.kill(worker.pid, signal.SIGSTOP)
    until(lambda: used() < math.inf)
    [place] = [place for place in frozen.here("another mark", "pytest") if place[1] == worker.pid]
    assert worker.pid not in [place[1] for place in frozen.here("another mark", "session_of_another_ray")]
    frozen.end_here(place, "another mark", "session_of_another_ray")
    assert psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED


def test_a_process_that_has_changed_is_not_ended(worker):
    [(machine, pid, created, _)] = [place for place in frozen.here("a_mark") if place[3]]
    frozen.end_here((machine, pid, created - 1, True), "a_mark")
    assert psutil.Process(pid).is_running()


def test_one_wait_is_told_once_a_minute_and_not_at_each_look(caplog, monkeypatch):
    monkeypatch.setattr(frozen, "NOTICE_S", 0.0)
    looks = []
    with Watch("a_mark", 0.1, lambda _: looks.append(1) or {}):
        until(lambda: len(looks) >= 8, 30)
    assert ["no data task has run" in record.getMessage() for record in caplog.records] == [True]


def test_looks_at_other_machines_make_one_task(monkeypatch):
    """Ray's head kept a task of each look, one every five seconds."""
    made, remote = [], ray.remote

    def counting(**options):
        made.append(options)
        return remote(**options)

    def look():
        return {}

    monkeypatch.setattr(ray, "remote", counting)
    for node in ("a" * 56, "b" * 56, "a" * 56):
        frozen.on(node, look)
    assert made == [{"num_cpus": 0, "max_retries": 0}]


def test_a_look_that_fails_ends_nothing_and_is_tried_again():
    looks, ended = [], []

    def look(title):
        looks.append(title)
        if len(looks) < 3:
            raise OSError("the cluster is ending")
        return {A: 1.0}

    with Watch("a_mark", 0.2, look, lambda place, title: ended.append(place)):
        until(lambda: ended)
    assert ended[0] == A
    assert len(looks) >= 3
