"""The first minute of engines: each phase of the first engine of a pool is told once, with its seconds."""

import threading
from dataclasses import dataclass, field, replace

import pytest

from actors.fakes import FakeEngine
from actors.pool.member import EngineStatus, PoolStatus
from actors.pool.pool import rescale
from jobs.engines import open_engines, tell_starts
from pipeline.errors import SettingError
from pipeline.overrides import resolve
from pipeline.recipes import demo


@dataclass
class Engine:
    state: str = "loading"
    phase: str = ""
    rows: int = 0


@dataclass
class Pool:
    """Tells one state after the other, and then that it has ended."""

    states: list = field(default_factory=list)

    def overview(self):
        if not self.states:
            raise RuntimeError("the pool is gone")
        return type("Status", (), {"engines": self.states.pop(0)})


def test_each_phase_is_told_once(monkeypatch):
    monkeypatch.setattr("jobs.engines.LOOK_S", 0.001)
    weights, said = Engine(phase="loading the weights"), []
    states = [[Engine()], [Engine()], [weights, Engine()], [weights], [Engine("serving")], [Engine("serving", rows=3)]]
    tell_starts({"rollout": Pool(states)}, said.append, threading.Event())
    assert [line.rpartition(", ")[0] for line in said] == [
        "engines.rollout: a process is being started",
        "engines.rollout: loading the weights",
        "engines.rollout: an engine serves, and works on its first answers",
        "engines.rollout: the first answers are there",
    ]
    assert all(line.endswith("s since the start of the pool") for line in said)


def test_a_pool_that_has_ended_is_told_by_others(monkeypatch):
    monkeypatch.setattr("jobs.engines.LOOK_S", 0.001)
    said = []
    tell_starts({"rollout": Pool()}, said.append, threading.Event())
    assert said == []


class Placed:
    """A pool whose engine Ray places at the second look."""

    def __init__(self, name, told):
        self.name, self.told = name, told

    def overview(self):
        self.told.append(f"look at {self.name}")
        pid = self.told.count(f"look at {self.name}") > 1
        return PoolStatus([replace(WAITS, pid=int(pid))], 0, 1, 1, 1, [], 0.0, 0.0)

    def close(self):
        self.told.append(f"close {self.name}")


WAITS = EngineStatus("big-1", "loading", 0, 0, 0, 0, 1.0, 0.0, 0, 0.0)
BIG = "teachers.big.engines={tensor_parallel: 8, placement: {gpus: 8}}"


def test_the_largest_engines_find_their_place_before_smaller_ones_are_asked_for(monkeypatch):
    """Six engines of one card lay on both nodes of eight, and none was left for the teacher that needs a whole one."""
    monkeypatch.setattr("jobs.engines.LOOK_S", 0.001)
    told = []

    def start(name, *_):
        told.append(f"start {name}")
        return Placed(name, told)

    monkeypatch.setattr("actors.pool.pool.EnginePool.start", start)
    run = resolve(demo(), ["engines.rollout.placement.gpus=1", "teachers.big.model=x", BIG])
    with open_engines(run, FakeEngine) as engines:
        assert list(engines) == ["rollout", "score", "teachers.big"]
    assert told == ["start big", "look at big", "look at big", "start rollout", "close rollout", "close big"]
    told.clear()
    with open_engines(run, FakeEngine, asking=("evaluation",)) as engines:
        assert list(engines) == ["rollout", "score"]
    assert told == ["start rollout", "close rollout"]


def test_a_pool_that_is_not_up_cannot_be_scaled():
    with pytest.raises(SettingError, match=r"big: is not up: nothing that this command has left to do asks it\. Pools: rollout"):
        rescale({"rollout": Placed("rollout", [])}, {"big": (1, 2)}, ())
