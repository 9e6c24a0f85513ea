"""`egrsd scale` on a live run, from another process; its mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until

from jobs import scale
from pipeline.config import EnginePools, Pool, Run, Source, Teacher
from pipeline.errors import SettingError, UserError
from pipeline.live import control
from pipeline.live.lease import LEASE
from pipeline.rounds.round import open_rounds
from pipeline.store.directory import Store

ROOT = Path(__file__).parents[2]
# A batch takes a second until the test has asked what it wants. What is left of the run then takes no time.
DRIVER = """
import os, sys, time
sys.path.insert(0, "tests")
import trainer_here
from actors.fakes import FakeEngine, UNWATCHED
from jobs import distill
from jobs.settle import Choices

uri, asked = sys.argv[1:]

class Slow(FakeEngine):
    def _take_time(self, num_tokens):
        if not os.path.exists(asked):
            time.sleep(1.0)
        super()._take_time(num_tokens)

sets = [*UNWATCHED, "rounds=2", "rollout.prompts_per_round=16", "rollout.prompts_per_shard=1", "rollout.group_size=2"]
sets += ["train.batch_traces=16", "grade.advantage=running", "evaluation.problems=0"]
sets += ["engines.inflight_shards=1", "engines.rollout.max=2"]
with trainer_here.instead_of_ray_train():
    distill.distill(uri, Choices("demo", sets), engine_class=Slow)
"""


def serving(store):
    """Engines that serve, as the driver answers whoever asks. A new command for each look takes longer than an engine's start."""
    try:
        engines = control.ask(store, {"sizes": {}})["pools"]["rollout"]["engines"]
    except UserError:  # on a full machine the driver may not answer in time
        return 0
    return [engine["state"] for engine in engines].count("serving")


@pytest.mark.timeout(1200)
def test_a_live_run_is_scaled_from_another_terminal_and_loses_nothing(egrsd, tmp_path):
    store, asked = Store(str(tmp_path / "run")), tmp_path / "asked"

    def answered(*sizes):
        """What the command prints, once the driver has answered in time."""

        def ask():
            done = egrsd("scale", "--run", store.uri, *sizes)
            return done.stdout if done.returncode == 0 else None

        return until(ask, what="an answer")

    driver = subprocess.Popen([sys.executable, "-c", DRIVER, store.uri, str(asked)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        until(lambda: store.entries("rounds/0000", "rollout"), what="the first shard")
        assert "rollout: 4 engines, 4 wanted" in answered("rollout=4")
        until(lambda: serving(store) == 4, what="four engines serve")
        shown = answered()
        assert shown.count("serving") == 4
        assert "batches wait" in shown
        for column in ("engine", "state", "batches", "policy", "tokens/s"):
            assert column in shown
        assert "1 to 2 wanted" in answered("rollout=1..2")
        never = egrsd("scale", "--run", store.uri, "rollout=5000")
        assert never.returncode == 2
        assert "5000 x 1 (engines.rollout) + 1 x 1 (train)" in never.stderr
        assert len(never.stderr.splitlines()) == 1
        asked.touch()
        assert driver.wait(timeout=400) == 0, driver.stdout.read()
    finally:
        driver.kill()
        driver.stdout.close()
    run, ids = store.load_run(), []
    for work in open_rounds(store, run):
        rows = [row for entry in store.entries(work.area, "rollout").values() for row in store.read(entry).to_pylist()]
        assert len(rows) == 32
        assert {row["policy_version"] for row in rows} == {work.number}
        assert {row["reject_reason"] for row in rows} == {None}
        ids += [row["trace_id"] for row in rows]
    assert len(set(ids)) == len(ids) == 64
    assert store.names("control") == []


def test_a_run_that_is_not_alive_says_so(egrsd, tmp_path):
    store = Store(str(tmp_path / "run"))
    store.save_run(Run(name="x"), {})
    done = egrsd("scale", "--run", store.uri, "rollout=4")
    assert done.returncode == 2
    assert "no command works on this run" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    store.write_json(LEASE, {"holder": "process 7 on far", "token": "x", "host": "far", "pid": 7, "beats": 0})
    with pytest.raises(UserError, match="process 7 on far does not answer"):
        control.ask(store, {"sizes": {}}, patience_s=0.5)
    assert store.names("control") == []


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("rolout=4", "unknown pool 'rolout'. Did you mean 'rollout'"),
        ("score=4", "unknown pool 'score'. This run's pools: rollout"),
        ("rollout", "'rollout' is no size"),
        ("rollout=-1", "'rollout=-1' is no size"),
        ("rollout=8..2", "rollout=8..2: least 8 is above most 2"),
        ("rollout=0..0", "most 0 is not within 1"),
        ("rollout=9999999", "is not within 1 to"),
    ],
)
def test_a_mistaken_size_is_one_line(size, message):
    with pytest.raises(SettingError) as caught:
        scale.parse([size], Run(name="x"))
    assert message in str(caught.value)


def test_sizes_are_bounds():
    run = Run(name="x", engines=EnginePools(score=Pool()))
    assert scale.parse(["rollout=4", "score=0..3"], run) == {"rollout": (4, 4), "score": (0, 3)}
    assert scale.parse(["rollout=0"], run) == {"rollout": (0, 1)}
    taught = Run(
        name="x", source=Source(teacher="who"), teachers={"big": Teacher(model="larger"), "own": Teacher(prompt="plain")}
    )
    assert scale.parse(["big=2"], taught) == {"big": (2, 2)}
    with pytest.raises(SettingError, match="unknown pool 'own'"):  # the student's engines answer for it
        scale.parse(["own=2"], taught)
