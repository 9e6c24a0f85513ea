"""Ray Train's leaders: one that has stopped is named and ended, and one that lives is left alone."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest
from waiting import until

from pipeline import notices
from pipeline.training import leaders

BUSY = (
    "import time\nwhile True:\n    sum(range(400_000))\n    time.sleep(0.01)"  # some ticks of 10 ms a look, on a full machine too
)


@pytest.fixture
def process():
    """A process that works half of the time."""
    started = subprocess.Popen([sys.executable, "-c", BUSY])
    yield psutil.Process(started.pid)
    started.kill()
    started.wait()


def test_a_leader_that_has_stopped_is_named_and_ended(process, monkeypatch):
    said = []
    monkeypatch.setattr(leaders, "NOTICE_S", 0.4)
    process.send_signal(signal.SIGSTOP)
    with notices.shown(said.append), leaders.Watch(1.0, lambda: leaders.here({process.pid: "TrainController"})):
        until(lambda: process.status() == psutil.STATUS_ZOMBIE, what="the stopped process is ended")
    who = f"training: Ray Train's TrainController (process {process.pid})"
    assert said[0].startswith(f"{who} has done nothing for ")
    assert said[0].endswith("It is ended after 1 s.")
    assert said[1].startswith(f"{who} did nothing for ")
    assert len(said) == 2


def test_a_rank_that_has_stopped_is_ended_after_the_health_check_had_its_time(process, monkeypatch):
    """Ray Train's health check does not run while a worker group starts. Twice the deadline has passed when the rank is ended."""
    said = []
    process.send_signal(signal.SIGSTOP)
    with notices.shown(said.append), leaders.Watch(0.8, lambda: leaders.here({process.pid: leaders.RANK})):
        until(lambda: process.status() == psutil.STATUS_ZOMBIE, what="the stopped rank is ended")
    [text] = said
    assert text.startswith(f"training: Ray Train's RayTrainWorker (process {process.pid}) did nothing for ")


def test_a_process_that_took_the_id_of_another_is_not_ended(process):
    [place] = leaders.here({process.pid: leaders.RANK})
    leaders.end_here((*place[:2], place[2] - 1, True))
    assert process.is_running()
    leaders.end_here(place)
    until(lambda: process.status() == psutil.STATUS_ZOMBIE, what="the very process is ended")


def test_a_leader_that_works_is_left_alone(process, monkeypatch):
    said, looks = [], []
    monkeypatch.setattr(leaders, "NOTICE_S", 1.0)

    def find():
        """Made-up seconds, which rise: a process that works gets no processor for a while where all cores are busy."""
        looks.append(1)
        return {place: (float(len(looks)), name) for place, (_, name) in leaders.here({process.pid: "TrainController"}).items()}

    with notices.shown(said.append), leaders.Watch(2.0, find):
        until(lambda: len(looks) >= 12, what="three times the deadline")
    assert process.is_running()
    assert said == []


def test_a_leader_that_has_just_ended_harms_nothing(process):
    looks = []

    def find():
        looks.append(1)
        process.kill()
        process.wait()
        return leaders.here({process.pid: "TrainController"})

    with leaders.Watch(0.2, find):
        until(lambda: len(looks) >= 3, what="it goes on to look")
    assert not process.is_running()


def test_while_no_rank_has_started_it_is_told_what_the_ranks_ask_for(process, monkeypatch):
    said, looks = [], []
    monkeypatch.setattr(leaders, "NOTICE_S", 0.4)
    monkeypatch.setattr(notices, "AGAIN_S", 0.0)

    def find():
        """A rank from the sixth look on."""
        looks.append(1)
        return {} if len(looks) <= 5 else leaders.here({process.pid: leaders.RANK})

    with notices.shown(said.append), leaders.Watch(1.0, find, "8 x (1 GPU)"):
        until(lambda: len(looks) >= 9, what="three more looks")
    assert said == ["training: no rank has started for 0 s. They ask for 8 x (1 GPU)."]
