"""Stages over a round, in threads or as Ray Data: only the missing and stale is computed, errors arrive as raised."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from in_process import Refusing, brought, planned, stale
from waiting import below, until

from actors.fakes import Behaviour, FakeEngine
from pipeline import notices
from pipeline.errors import EngineError, SettingError, StoreError
from pipeline.problems.sources import open_source
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import with_engines
from pipeline.rounds.running.in_tasks import Cut
from pipeline.rounds.running.schedule import execute
from pipeline.stages import LABELS, MEASURE, PLAN, STAGES

TASKS = "shards_here=0"  # every shard is computed by a task of Ray Data


def test_ray_data_streams_a_round_and_a_second_time_computes_nothing(ray_local, tmp_path):
    work = planned(tmp_path, TASKS)
    source = open_source(work.run.source)
    seen = []
    execute(work, MEASURE, source, on_entry=lambda entry, new: seen.append((entry.stage, entry.shard, new)))
    assert sorted(seen) == sorted((name, shard, True) for name in MEASURE for shard in ("0000", "0001"))
    left = work.store.entry(work.area, "score", "0000").path.replace("/score/", "/profile/")  # by a task killed before its entry
    work.store.write(left, b"")
    execute(work, LABELS)
    assert stale(work) == {}
    assert work.store.read_bytes(left) is None  # it stayed, and cost a look for ever
    seen.clear()
    execute(work, MEASURE, source, on_entry=lambda entry, new: seen.append(new))
    execute(work, LABELS, on_entry=lambda entry, new: seen.append(new))
    assert seen == [False] * 12


def test_ray_and_threads_give_the_very_shards_that_a_loop_gives(ray_local, tmp_path):
    loop, rayed, threaded = (planned(tmp_path / name, *more) for name, *more in (("loop",), ("ray", TASKS), ("threads",)))
    brought(loop)
    for work in (rayed, threaded):
        execute(work, MEASURE, open_source(work.run.source))
        execute(work, LABELS)
    for stage in PLAN:
        hashes = [{s: e.sha256 for s, e in w.store.entries(w.area, stage.name).items()} for w in (loop, rayed, threaded)]
        assert hashes[0] == hashes[1] == hashes[2], stage.name


@pytest.mark.parametrize(("cpus", "least"), [(1, 1), (2, 2), (96, 4)])
@pytest.mark.parametrize("shards", [1, 4, 100, 31_250])
@pytest.mark.parametrize("inflight", [1, 4, 64, 256, 4000])
def test_shards_wait_as_threads_of_a_few_tasks(shards, inflight, cpus, least):
    cut, inflight = Cut.of(shards, inflight, cpus), min(inflight, shards)
    assert inflight <= cut.tasks * cut.threads < inflight + cut.tasks
    assert cut.tasks == inflight if inflight <= least else least <= cut.tasks <= max(least, -(-inflight // 32))
    assert cut.threads <= cut.rows * cut.group <= 4 * cut.threads + cut.group
    assert -(-shards // cut.group) <= 2048


def test_a_killed_task_costs_its_unfinished_shards_alone(ray_local, tmp_path):
    work = planned(tmp_path, TASKS, "rollout.prompts_per_round=80", engine=partial(FakeEngine, behaviour=Behaviour(batch_s=0.2)))
    brought(work, "prompts")
    seen, killed = {}, []

    def kill_a_task(entry, computed):
        seen[entry.shard] = computed
        tasks = below("_bring_rows_up_to_date")
        if not killed and tasks:
            killed.append(tasks[0].pid)
            os.kill(tasks[0].pid, signal.SIGKILL)

    execute(work, ("rollout",), inflight=16, on_entry=kill_a_task)
    assert killed
    assert seen.keys() == work.shards.keys()  # none lost, although the task that died had handed some on
    assert list(seen.values()).count(True) >= len(seen) - 16
    assert not any(Inventory(work, whole=False).why_stale(STAGES["rollout"], shard) for shard in work.shards)


def test_a_stopped_task_is_ended_and_its_shards_are_done_again(ray_local, tmp_path):
    """It makes the very shards that nobody stopped. A task that waits for an engine for as long is left alone."""
    calm = planned(tmp_path / "calm")
    brought(calm, "prompts", "rollout")
    slow = partial(FakeEngine, behaviour=Behaviour(batch_s=12.0))
    work, stopped = planned(tmp_path / "run", TASKS, "stall_timeout_s=10", engine=slow), []

    def stop_a_task():
        for process in below("ray::MapBatches(_bring_rows_up_to_date")[:1]:
            os.kill(process.pid, signal.SIGSTOP)
            stopped.append(process.pid)

    told = []
    with notices.shown(told.append), ThreadPoolExecutor(1) as pool:
        brought(work, "prompts")
        stopping = pool.submit(lambda: until(lambda: stop_a_task() or stopped))
        execute(work, ("rollout",), inflight=2)
        stopping.result()
    [line] = [line for line in told if "data task" in line]
    assert f"a data task (process {stopped[0]} on" in line  # the other task was busy, and nobody ended it
    hashes = [{s: e.sha256 for s, e in w.store.entries(w.area, "rollout").items()} for w in (calm, work)]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("tasks", ["shards_here=0", "shards_here=2"])
def test_an_error_in_a_task_or_thread_arrives_as_it_was_raised(ray_local, tmp_path, tasks):
    work = planned(tmp_path, "prompts.teacher={problem} only", tasks)
    with pytest.raises(SettingError, match=r"prompts\.teacher: lacks"):
        execute(work, MEASURE, open_source(work.run.source))


def test_a_missing_shard_alone_is_computed_again(tmp_path):
    work = planned(tmp_path)
    brought(work)
    work.store.delete(f"{work.area}/grade/0001.json")
    assert brought(work) == [("grade", "0001")]


def test_relabelling_asks_no_engine(tmp_path):
    brought(planned(tmp_path))
    work = planned(tmp_path, "label.gamma=1", engine=Refusing)
    assert brought(work) == [("label", "0000"), ("label", "0001")]


def test_a_damaged_shard_is_refused_before_use_and_recomputed_on_request(tmp_path):
    work = planned(tmp_path)
    brought(work)
    entry = work.store.entry(work.area, "score", "0000")
    path = tmp_path / work.area / "score" / entry.data
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="sha256 differs"):
        brought(work, "profile", force=True)
    assert ("score", "0000") in brought(work, "score", force=True)
    brought(work, "profile", force=True)
    assert work.store.entry(work.area, "score", "0000").sha256 == entry.sha256


def test_a_stage_without_its_input_says_which_to_run(tmp_path):
    work = planned(tmp_path)
    with pytest.raises(StoreError, match="Run these first: prompts"):
        brought(work, "rollout")


def test_a_stage_is_not_made_from_a_stale_input(tmp_path):
    brought(planned(tmp_path))
    with pytest.raises(StoreError, match=r"an input of stage label is stale: profile \(settings\)"):
        brought(planned(tmp_path, "profile.window=0"), "label", force=True)


def test_other_numerics_may_not_score_what_these_wrote(tmp_path):
    brought(planned(tmp_path))
    work = planned(tmp_path)
    half = FakeEngine(work.run.model.model_copy(update={"dtype": "bfloat16"}), None, work.run.score)
    with pytest.raises(EngineError, match="dtype was float32, now bfloat16"):
        brought(with_engines(work, {"score": half}), "score", force=True)
