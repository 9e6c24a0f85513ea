"""The first minute of engines: each phase of the first engine of a pool is told once, with its seconds."""

import threading
from dataclasses import dataclass, field

from jobs.engines import tell_starts


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
