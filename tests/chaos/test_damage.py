"""Disks that fill up, entries torn in half, bits that flip, clocks that lie: told before anything is built on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trainer_here
from chaos_run import files, metrics, shards, weights

from actors.fakes import UNWATCHED, Behaviour, FakeEngine
from jobs import distill, export, stage, train
from jobs.settle import Choices
from pipeline.errors import UserError
from pipeline.live import lease
from pipeline.stages import MEASURE, PLAIN, STAGES
from pipeline.store.directory import Store

SETS = [
    *UNWATCHED,
    "rounds=1",
    "rollout.prompts_per_round=4",
    "rollout.prompts_per_shard=2",
    "rollout.group_size=4",
    "grade.advantage=running",
    "train.batch_traces=8",
    "train.warmup_steps=0",
    "evaluation.problems=0",
]
pytestmark = pytest.mark.timeout(900)


def run_distill(uri: str) -> None:
    """`egrsd distill` on fake engines, in this process."""
    distill.distill(uri, Choices("demo", SETS), engine_class=partial(FakeEngine, behaviour=Behaviour()))


@pytest.fixture(scope="module")
def finished(ray_local, tmp_path_factory):
    """A finished run."""
    uri = str(tmp_path_factory.mktemp("runs") / "run")
    with trainer_here.instead_of_ray_train():
        run_distill(uri)
    return uri


@pytest.fixture
def untrained(finished, tmp_path):
    """Copies of it whose round is finished and not trained."""
    store = Store(str(shutil.copytree(finished, tmp_path / "copy")))
    for path in ("policy", "train", "metrics", "rounds/0000/ready.json"):
        store.delete(path)
    return store


def flip(store: Store, name: str) -> str:
    """Flips one bit in the middle of the first shard of a stage; its path."""
    entry = store.entry("rounds/0000", name, "0000")
    path = store.local_root / "rounds/0000" / name / entry.data
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    return str(path)


def error_of(capfd, verb, *arguments) -> str:
    """What a verb says before it ends with an error; no traceback."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        verb(*arguments)
    assert ended.value.code in {1, 2}
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said
    return next(line for line in said.splitlines() if line.startswith("error:"))


@pytest.mark.parametrize("name", MEASURE)
def test_a_flipped_bit_is_found_by_train_and_by_distill_before_it_is_trained_on(untrained, trained_here, capfd, name):
    path = flip(untrained, name)
    for said in (
        error_of(capfd, train.train_committed, untrained.uri, None, [], None, False),
        error_of(capfd, run_distill, untrained.uri),
    ):
        assert f"{path}: the bytes are not those that were committed" in said
        assert f"`egrsd stage {name} --run {untrained.uri} --round 0 --shard 0000 --force`" in said
    assert untrained.latest_policy() == 0
    assert untrained.names("metrics") == []


@pytest.mark.chaos
def test_a_flipped_bit_that_a_rank_finds_reaches_the_user_through_ray_train(untrained, capfd):
    """As above with the real trainer: what a rank in a process of its own raises is told as one line, not as a failed job."""
    path = flip(untrained, "score")
    said = error_of(capfd, train.train_committed, untrained.uri, None, [], None, False)
    assert f"{path}: the bytes are not those that were committed" in said
    assert f"`egrsd stage score --run {untrained.uri} --round 0 --shard 0000 --force`" in said
    assert untrained.latest_policy() == 0
    assert untrained.names("metrics") == []


@pytest.mark.parametrize("reader", [s for s in PLAIN if s.inputs and s.where == "CPU"], ids=lambda s: s.name)
def test_a_flipped_bit_is_found_by_every_stage_that_reads_it(untrained, capfd, reader):
    for name in set(reader.inputs) - {"reward"}:
        path = flip(untrained, name)
        old = untrained.entry("rounds/0000", reader.name, "0000")
        said = error_of(capfd, stage.run_stage, untrained.uri, stage.Redo(reader.name, "0", force=True, shards=["0000"]))
        assert f"{path}: the bytes are not those that were committed" in said
        assert untrained.entry("rounds/0000", reader.name, "0000") == old
        flip(untrained, name)  # the same bit again: whole


@pytest.mark.parametrize("name", [stage.name for stage in PLAIN])
def test_a_flipped_bit_is_found_by_export_and_the_remedy_repairs_it(untrained, finished, capfd, tmp_path, name):
    path = flip(untrained, name)
    said = error_of(capfd, export.export_run, untrained.uri, str(tmp_path / "out"), False)
    assert f"{path}: the bytes are not those that were committed" in said
    assert f"`egrsd stage {name} --run {untrained.uri} --round 0 --shard 0000 --force`" in said
    if STAGES[name].where == "CPU":  # the others want an engine, and this test has only fakes
        stage.run_stage(untrained.uri, stage.Redo(name, "0", force=True, shards=["0000"]))
        assert shards(untrained.uri) == shards(finished)


def test_a_flipped_bit_in_a_policy_is_found_before_an_engine_answers_with_it(finished, trained_here, tmp_path, capfd):
    store = Store(str(shutil.copytree(finished, tmp_path / "copy")))
    path = store.local_root / "policy/0001/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    sets = [*SETS, "rounds=2"]
    choices = Choices("demo", sets, accept_changes=True)
    said = error_of(capfd, distill.distill, store.uri, choices, None, False, partial(FakeEngine))
    assert f"{path}: the file is missing or damaged" in said
    assert "Delete its folder and those of all later policies, and resume" in said
    assert store.entries("rounds/0001", "rollout") == {}
    store.delete("policy/0001")
    distill.distill(store.uri, choices, engine_class=partial(FakeEngine))
    assert store.read_json("policy/0001/manifest.json") == Store(finished).read_json("policy/0001/manifest.json")


@pytest.mark.parametrize("name", ["prompts", "score"])
def test_a_torn_manifest_entry_is_named_by_every_verb_and_made_anew_once_it_is_gone(
    untrained, finished, trained_here, capfd, tmp_path, name
):
    path = untrained.local_root / "rounds/0000" / name / "0000.json"
    path.write_bytes(path.read_bytes()[:50])
    for verb, *arguments in (
        (run_distill, untrained.uri),
        (train.train_committed, untrained.uri, None, [], None, False),
        (stage.run_stage, untrained.uri, stage.Redo("label", "0")),
        (export.export_run, untrained.uri, str(tmp_path / "out"), False),
    ):
        said = error_of(capfd, verb, *arguments)
        assert f"{path}: is not JSON" in said
        assert "delete it and run the same command again" in said
    path.unlink()
    run_distill(untrained.uri)
    assert shards(untrained.uri) == shards(finished)
    assert weights(untrained.uri) == weights(finished)


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, of 2 MiB: (mount point, a function that changes its size)."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {mounted.stderr.strip()}")
    yield place, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("free", [8192, 60_000, pytest.param(300_000, marks=pytest.mark.chaos)])
def test_a_disk_that_is_full_in_the_middle_of_a_commit_leaves_nothing_half_and_the_same_command_goes_on(
    finished, disk, capfd, free, request
):
    """`free`: bytes there are: for the first files, for some shards, for all shards but not for the policy."""
    if free < 300_000:  # the disk is full before a rank writes to it
        request.getfixturevalue("trained_here")
    place, resize = disk
    spare = os.statvfs(place)
    (place / "filler").write_bytes(bytes(spare.f_bavail * spare.f_frsize - free))
    uri = str(place / "run")
    said = error_of(capfd, run_distill, uri)
    assert "No space left on device" in said
    assert "Free some space and run the same command again" in said
    store = Store(uri)
    shards(uri)  # every entry that is there describes a whole shard
    assert store.latest_policy() == 0
    (place / "filler").unlink()
    resize("64m")
    run_distill(uri)
    assert shards(uri) == shards(finished)
    assert weights(uri) == weights(finished)
    assert metrics(uri) == metrics(finished)
    assert files(uri) == files(finished)


HOLD = """
import sys, time
day = float(sys.argv[2]) * 86400
wall, steady = time.time, time.monotonic
time.time, time.monotonic = lambda: wall() + day, lambda: steady() + day
from pipeline.live import lease
from pipeline.store.directory import Store
lease.BEAT_S = 0.2
with lease.held(Store(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("days", [-1, 1])
def test_a_holder_whose_clock_is_a_day_off_is_judged_the_same(tmp_path, days):
    """Alive it keeps its run; dead, and as if elsewhere, it loses it after the time to live and not before."""
    store = Store(str(tmp_path / "run"))
    holder = subprocess.Popen([sys.executable, "-c", HOLD, store.uri, str(days)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(UserError, match=f"process {holder.pid} on .* is working on this run"), lease.held(store, ttl_s=120):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    store.write_json(lease.LEASE, store.read_json(lease.LEASE) | {"host": "another machine"})
    os.utime(Path(store.uri) / lease.LEASE, (0, 0))
    with lease.held(store, ttl_s=0.5) as mine:
        mine.check()
