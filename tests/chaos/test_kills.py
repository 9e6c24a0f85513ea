"""Kill anything: whatever dies, the run ends as if nothing had.

make chaos                                                          all seeds, real engine included
pytest -m chaos "tests/chaos/test_kills.py::test_fake[3]"           one seed again: same victims, same order, same amounts of work
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time

import chaos_run
import psutil
import pytest
from chaos_ground import ROOT, marked
from chaos_run import FAKE, KINDS, STALLS, check, check_policy_versions, disturb, fake, real, seconds
from waiting import until

from pipeline.store.directory import Store

SHORT = (*FAKE, "rounds=1", "evaluation.problems=0")
LONG = (*FAKE, "rounds=6")
OVERLAPPED = (
    *LONG,
    "max_staleness=1",
    "engines.rollout.min=1",
    "engines.rollout.max=3",
    "engines.rollout.grow_after_s=0.5",
    "engines.rollout.shrink_after_s=3",
    "grade.verifier=math",  # graded in child processes, which must not outlive a killed parent
)
REAL = (
    *chaos_run.SMALL,
    chaos_run.TASKS,
    "rounds=5",
    "rollout.max_new_tokens=72",
    r"grade.answer_pattern=#(-?\d+)$",
    "engines.rollout.placement.cpus=1",
    "engines.inflight_shards=1",  # so that what shares a batch, hence its last bits, does not depend on timing
    "evaluation.problems=0",
)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_few_kills(ground, undisturbed, tmp_path, held):
    """The short form: an engine, its dispatcher and the rank die once each in one round."""
    whole, uri = undisturbed(fake, *SHORT), str(tmp_path / "run")
    kills = list(disturb(fake(ground, uri, *SHORT), uri, 1, ("engine", "pool", "rank"), pace=6))
    check(ground, uri, whole)
    assert check_policy_versions(uri) == {("teacher", 0): 8, ("student", 0): 24}
    assert len(kills) == 3
    held("fake", kills)


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(6))
def test_fake(ground, undisturbed, tmp_path, held, seed):
    whole, uri = undisturbed(fake, *LONG), str(tmp_path / "run")
    kills = list(disturb(fake(ground, uri, *LONG), uri, seed))
    check(ground, uri, whole)
    assert len(kills) >= 5  # of six: the last one's turn may come after the run
    held("fake", kills)


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(30, 33))
def test_fake_stopped(ground, undisturbed, tmp_path, held, seed):
    """As `test_fake`, but the victims are stopped and not killed. The driver alone goes on by itself, after some seconds."""
    whole, uri = undisturbed(fake, *LONG), str(tmp_path / "run")
    pace = 20  # an engine works on while another one stands still, so more work passes between two stops than between two kills
    kills = list(disturb(fake(ground, uri, *LONG, *STALLS), uri, seed, pace=pace, how="stop"))
    check(ground, uri, whole)
    assert len(kills) >= 5
    held("fake", kills)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_fake_slow(ground, undisturbed, tmp_path, held):
    """Processes that stand still for a while, and less long than the deadline, are left alone."""
    whole, uri = undisturbed(fake, *LONG), str(tmp_path / "run")
    kills = list(disturb(fake(ground, uri, *LONG, *STALLS), uri, 40, ("engine", "pool", "task", "rank"), how="slow"))
    check(ground, uri, whole)
    assert len(kills) >= 3
    held("fake", kills)


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(6, 9))
def test_fake_overlapped(ground, undisturbed, tmp_path, held, seed):
    """Rounds that overlap, on a pool that grows and shrinks."""
    whole, uri = undisturbed(fake, *OVERLAPPED), str(tmp_path / "run")
    kills = list(disturb(fake(ground, uri, *OVERLAPPED), uri, seed))
    check(ground, uri, whole)
    assert len(kills) >= 5
    held("fake", kills)


@pytest.mark.chaos
@pytest.mark.engine
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("seed", "how"), [(0, "kill"), (1, "kill"), (50, "stop")])
def test_real(ground, undisturbed, tmp_path, held, seed, how):
    """vLLM: the same trace ids, and a final adapter that equals the undisturbed one within TOLERANCE of its largest weight."""
    whole, uri = undisturbed(real, *REAL), str(tmp_path / "run")
    kills = list(disturb(real(ground, uri, *REAL, *(STALLS if how == "stop" else ())), uri, seed, KINDS, 10, how))
    chaos_run.check_whole(uri, whole)
    chaos_run.check_clean(ground, uri, whole, same_names=False)
    difference, largest = chaos_run.largest_difference(uri, whole)
    print(f"final adapters differ by {difference:.3g} at most, largest weight {largest:.3g}")
    assert difference <= TOLERANCE * largest
    assert len(kills) >= 5
    held("real", kills)


TOLERANCE = 1e-3


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(20, 22))
def test_a_driver_with_its_own_ray(ground, undisturbed, tmp_path, held, seed):
    """As on a laptop: the driver's cluster goes with it, whole, and the same command goes on."""
    sets = tuple(name for name in SHORT if "gpus" not in name and ".resources." not in name)
    whole, uri = undisturbed(fake, *sets), str(tmp_path / "run")
    command = fake(ground, uri, *sets, address="local")
    before = {process.pid for process in marked(ground.mark)}
    rng, kills, start = random.Random(seed), [], time.monotonic()
    command.start()
    for goal in (rng.randint(1, 10), rng.randint(11, 40)):
        until(lambda goal=goal: chaos_run.work_done(uri) >= goal or not command.running(), 180, "no progress")
        if not command.running():
            break
        kills.append(chaos_run.Kill(seed, seconds(start), "driver", command.process.pid, "own Ray", chaos_run.progress(uri)))
        command.process.kill()
        command.process.wait()
        until(lambda: not {p.pid for p in marked(ground.mark)} - before, 60, "a process of the dead driver's Ray is left")
        command.start()
    command.finish()
    check(ground, uri, whole)
    assert kills
    held("own Ray", kills)


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_engines_that_load_on_nodes_that_vanish_are_not_an_engine_that_cannot_load(ground, undisturbed, tmp_path, held):
    """More of them than the pool would forgive an engine that dies on its own."""
    sets = (*SHORT, "engines.rollout.min=4", "engines.rollout.max=4")
    uri, kills, start = str(tmp_path / "run"), [], time.monotonic()
    command = fake(ground, uri, *sets, start_s=8)
    command.start()
    for which in (0, 1):
        until(lambda: len(ground.victims("engine")) == 4, 120, "four engines")
        pid, doing = ground.lose_node(which, at_raylet=False)
        kills.append(chaos_run.Kill(0, seconds(start), "node", pid, doing, chaos_run.progress(uri)))
        ground.add_node()
        until(lambda: len(ground.victims("engine")) < 4, 60, "engines of a lost node are gone")
    command.finish()
    chaos_run.check_clean(ground, uri, undisturbed(fake, *SHORT))
    assert [kill.kind for kill in kills] == ["node", "node"]
    assert chaos_run.trace_ids(uri)  # the run that lost its engines went on
    held("fake", kills)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_every_row_is_of_the_policy_its_round_asked_for_while_engines_die_and_join(ground, tmp_path, held):
    """Engines are killed and the pool is resized from another terminal, all the time; every stored row is looked at."""
    sets = (*SHORT, "rounds=3", "engines.rollout.min=1", "engines.rollout.max=3", "engines.rollout.grow_after_s=0.2")
    uri = str(tmp_path / "run")
    command = fake(ground, uri, *sets)
    rng, sizes, deaths, start = random.Random(5), ["1..3", "3..3", "1..1", "2..3"], [], time.monotonic()
    resized = []
    command.start()
    while command.running():
        time.sleep(rng.uniform(0.5, 2))
        victims = ground.victims("engine")
        if victims and chaos_run.work_done(uri) > len(deaths) * 8:
            victim = rng.choice(victims)
            deaths.append(chaos_run.Kill(5, seconds(start), "engine", victim.pid, "", chaos_run.progress(uri)))
            os.kill(victim.pid, signal.SIGKILL)
        ask = [sys.executable, "-m", "jobs", "scale", "--run", uri, f"rollout={rng.choice(sizes)}"]
        asked = subprocess.run(ask, cwd=ROOT, env=os.environ | ground.environment, capture_output=True, text=True, timeout=60)
        if asked.returncode == 0:
            resized.append(re.search(r"(\d+)( to \d+)? wanted", asked.stdout)[0])
    command.finish()
    assert len(deaths) >= 3
    assert len(set(resized)) >= 2, resized
    seen = check_policy_versions(uri)
    assert seen == {("teacher", 0): 3 * 8, **{("student", version): 24 for version in range(3)}}
    held("fake", deaths)


@pytest.mark.chaos
def test_a_second_driver_is_refused_and_the_dead_ones_place_is_free(ground, tmp_path):
    """Two real commands on one run; then the first dies without a word."""
    uri = str(tmp_path / "run")
    first = fake(ground, uri, *SHORT)
    first.start()
    until(lambda: Store(uri).read_json("lease.json") is not None, 60, "no lease")
    started = time.monotonic()
    second = subprocess.run(
        [
            sys.executable,
            "-m",
            "jobs",
            "distill",
            "--run",
            uri,
            "--recipe",
            "demo",
            *(p for s in chaos_run.once(SHORT) for p in ("--set", s)),
        ],
        cwd=ROOT,
        env=os.environ | ground.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert second.returncode == 2, second.stdout + second.stderr
    assert f"process {first.process.pid} on " in second.stderr
    assert "is working on this run" in second.stderr
    assert time.monotonic() - started < 60
    first.process.kill()
    first.process.wait()
    first.start()
    first.finish()
    assert Store(uri).read_json("lease.json") is None


@pytest.mark.chaos
def test_the_harness_sees_what_a_kill_leaves(ground, tmp_path):
    """Its checks can fail: a process, a reservation and an actor of a driver that still runs are found."""
    command = fake(ground, str(tmp_path / "run"), *SHORT)
    command.start()
    until(lambda: ground.victims("engine") and ground.victims("rank"), 120, "no engine")
    assert ground.reserved()["GPU"] >= 0.25
    assert {"EngineActor ALIVE", "Dispatcher ALIVE"} <= set(ground.actors())
    assert any("EngineActor" in line for line in ground.remains())
    psutil.Process(command.process.pid).kill()
    command.process.wait()
    ours = lambda lines: [line for line in lines if chaos_run.RAYS_CLEANER not in line]  # noqa: E731
    until(lambda: not (ground.reserved() or ours(ground.actors()) or ours(ground.remains())), 60, "something is left")
