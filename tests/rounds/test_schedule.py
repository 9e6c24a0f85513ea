"""The stages as Ray Data executions: only the missing and stale is computed, errors arrive as raised, rounds are lineage."""

import json
import os
import signal
from functools import partial

import psutil
import pyarrow as pa
import pytest
from in_process import bring_up_to_date

from actors.fakes import Behaviour, FakeEngine
from pipeline.errors import EngineError, SettingError, StoreError, UserError
from pipeline.method.rewards import RunningBaseline
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.recipes import demo
from pipeline.rounds import inventory
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import open_round, plan_round, with_engines
from pipeline.rounds.rows import round_table
from pipeline.rounds.schedule import Cut, execute
from pipeline.stages import LABELS, MEASURE, PLAN, STAGES
from pipeline.store.directory import Store, area

SETS = ["rollout.prompts_per_round=4", "rollout.prompts_per_shard=2", "rollout.group_size=2"]


class Refusing(FakeEngine):
    """A fake engine that must not be asked."""

    def generate(self, requests, policy, sampling):
        raise EngineError("asked to generate", "test")

    def score(self, sequences, policy):
        raise EngineError("asked to score", "test")


def planned(tmp_path, *sets, engine=FakeEngine, number=0):
    run = resolve(demo(), [*SETS, *sets])
    store = Store(str(tmp_path))
    work = plan_round(store, run, "rounds", number, 0, open_source(run.source))
    fake = engine(run.model, run.engines.rollout, run.score)
    return with_engines(work, {"rollout": fake, "score": fake})


def brought(work, *stages, force=False):
    """The stages of every shard, without Ray; returns the names of those computed."""
    source = open_source(work.run.source)
    computed = []
    for name in stages or (*MEASURE, *LABELS):
        for shard, indices in work.shards.items():
            problems = source.rows(indices) if name == "prompts" else None
            entry, new = bring_up_to_date(work, STAGES[name], shard, problems, force)
            computed += [(name, shard)] if new else []
            assert entry == work.store.entry(work.area, name, shard)
    return computed


def stale(work):
    return {
        (s.name, shard): why for s in PLAN for shard in work.shards if (why := Inventory(work, whole=False).why_stale(s, shard))
    }


def test_ray_data_streams_a_round_and_a_second_time_computes_nothing(ray_local, tmp_path):
    work = planned(tmp_path)
    source = open_source(work.run.source)
    seen = []
    execute(work, MEASURE, source, on_entry=lambda entry, new: seen.append((entry.stage, entry.shard, new)))
    assert sorted(seen) == sorted((name, shard, True) for name in MEASURE for shard in ("0000", "0001"))
    execute(work, LABELS)
    assert stale(work) == {}
    seen.clear()
    execute(work, MEASURE, source, on_entry=lambda entry, new: seen.append(new))
    execute(work, LABELS, on_entry=lambda entry, new: seen.append(new))
    assert seen == [False] * 12


def test_ray_gives_the_very_shards_that_a_loop_gives(ray_local, tmp_path):
    loop, rayed = planned(tmp_path / "loop"), planned(tmp_path / "ray")
    brought(loop)
    execute(rayed, MEASURE, open_source(rayed.run.source))
    execute(rayed, LABELS)
    for stage in PLAN:
        hashes = [{s: e.sha256 for s, e in w.store.entries(w.area, stage.name).items()} for w in (loop, rayed)]
        assert hashes[0] == hashes[1], stage.name


@pytest.mark.parametrize("shards", [1, 4, 100, 31_250])
@pytest.mark.parametrize("inflight", [1, 4, 64, 256, 4000])
def test_shards_wait_as_threads_of_a_few_tasks(shards, inflight):
    cut, inflight = Cut.of(shards, inflight), min(inflight, shards)
    assert inflight <= cut.tasks * cut.threads < inflight + cut.tasks
    assert cut.tasks == inflight if inflight <= 4 else 4 <= cut.tasks <= max(4, -(-inflight // 32))
    assert cut.threads <= cut.rows * cut.group <= 4 * cut.threads + cut.group
    assert -(-shards // cut.group) <= 2048


def test_a_killed_task_costs_its_unfinished_shards_alone(ray_local, tmp_path):
    work = planned(tmp_path, "rollout.prompts_per_round=80", engine=partial(FakeEngine, behaviour=Behaviour(batch_s=0.2)))
    source = open_source(work.run.source)
    execute(work, ("prompts",), source)
    seen, killed = {}, []

    def kill_a_task(entry, computed):
        seen[entry.shard] = computed
        tasks = [p for p in psutil.Process().children(recursive=True) if "_bring_rows_up_to_date" in " ".join(_command(p))]
        if not killed and tasks:
            killed.append(tasks[0].pid)
            os.kill(tasks[0].pid, signal.SIGKILL)

    execute(work, ("rollout",), inflight=16, on_entry=kill_a_task)
    assert killed
    assert seen.keys() == work.shards.keys()  # none lost, although the task that died had handed some on
    assert list(seen.values()).count(True) >= len(seen) - 16
    assert not any(Inventory(work, whole=False).why_stale(STAGES["rollout"], shard) for shard in work.shards)


def _command(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_an_error_in_a_task_arrives_as_it_was_raised(ray_local, tmp_path):
    work = planned(tmp_path, "prompts.teacher='{problem} only'")
    with pytest.raises(SettingError, match=r"prompts\.teacher: lacks"):
        execute(work, MEASURE, open_source(work.run.source))


def test_a_missing_shard_alone_is_computed_again(tmp_path):
    work = planned(tmp_path)
    brought(work)
    work.store.delete(f"{work.area}/grade/0001.json")
    assert brought(work) == [("grade", "0001")]


def test_a_setting_makes_exactly_its_stages_stale(tmp_path):
    brought(planned(tmp_path))
    shards = ("0000", "0001")
    for setting, expected in {
        "label.gamma=1": {("label", s): "settings" for s in shards},
        "train.learning_rate=1": {},
        "grade.beta_length=0": {("grade", s): "settings" for s in shards},
        "profile.window=0": {("profile", s): "settings" for s in shards},
        "label.min_normaliser=2": {(n, s): "settings" for n in LABELS for s in shards},
        "rollout.temperature=2": {("rollout", s): "settings" for s in shards},
        "grade.processes=2": {},
    }.items():
        run = resolve(demo(), [*SETS, setting])
        assert stale(open_round(Store(str(tmp_path)), run, "rounds", 0)) == expected, setting


def test_relabelling_asks_no_engine(tmp_path):
    brought(planned(tmp_path))
    work = planned(tmp_path, "label.gamma=1", engine=Refusing)
    assert brought(work) == [("label", "0000"), ("label", "0001")]


def test_a_recomputed_input_with_the_same_bytes_makes_nothing_stale(tmp_path):
    work = planned(tmp_path)
    brought(work)
    assert brought(work, "rollout", force=True) == [("rollout", "0000"), ("rollout", "0001")]
    assert stale(work) == {}


def test_what_changed_upstream_is_named(tmp_path):
    brought(planned(tmp_path))
    work = planned(tmp_path, "grade.beta_length=0.25", engine=Refusing)
    texts = brought(work, "grade")
    assert len(texts) == 2
    reasons = stale(work)
    assert set(reasons.values()) <= {"grade changed"}
    assert {stage for stage, _ in reasons} <= {"label"}


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


def test_a_round_of_nothing_but_rejected_rows_goes_through_and_is_counted(tmp_path):
    work = planned(tmp_path, "model.max_model_len=74")
    brought(work)
    inventory.commit_round(work)
    table = round_table(work.store, 0)
    assert table["reject_reason"].to_pylist() == ["prompt_too_long"] * 8
    for stage in PLAN[1:]:
        assert sum(sum(e.rejected.values()) for e in work.store.entries(work.area, stage.name).values()) == 8


def test_ids_and_traces_do_not_depend_on_the_cut_into_shards(tmp_path):
    coarse, fine = planned(tmp_path / "a"), planned(tmp_path / "b", "rollout.prompts_per_shard=1")
    traces = []
    for work in (coarse, fine):
        brought(work, "prompts", "rollout")
        tables = [
            work.store.read(e, ["trace_id", "response_tokens"])
            for _, e in sorted(work.store.entries(work.area, "rollout").items())
        ]
        traces.append(pa.concat_tables(tables).to_pylist())
    assert traces[0] == traces[1]
    assert len({row["trace_id"] for row in traces[0]}) == 8


def test_a_source_smaller_than_a_round_still_gives_distinct_traces(tmp_path):
    source = tmp_path / "three.jsonl"
    rows = [{"problem": f"{i}+1+1+1", "solution": "x", "answer": "1"} for i in range(3)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = planned(tmp_path / "run", f"source.uri={source}", "rollout.prompts_per_round=8")
    brought(work, "prompts", "rollout")
    entries = sorted(work.store.entries(work.area, "rollout").items())
    ids = [i for _, e in entries for i in work.store.read(e, ["trace_id"])["trace_id"].to_pylist()]
    assert len(ids) == len(set(ids)) == 16


def test_the_peak_of_the_round_needs_every_shard(tmp_path):
    work = planned(tmp_path)
    brought(work, *MEASURE)
    peak = inventory.Inventory(work).scope[0]
    facts = [e.facts["entropy_max"] for e in work.store.entries(work.area, "score").values()]
    assert peak == max(facts) > 0
    work.store.delete(f"{work.area}/score/0001.json")
    assert inventory.Inventory(work).scope is None


def test_the_trainer_gets_the_committed_shards_and_no_others(tmp_path):
    work = planned(tmp_path)
    with pytest.raises(StoreError, match="committed with a shard missing"):
        inventory.commit_round(work)
    assert round_table(work.store, 0) is None
    brought(work, *MEASURE)
    inventory.commit_round(work)
    table = round_table(work.store, 0)
    assert table.num_rows == 8
    assert {"prompt_tokens", "response_tokens", "teacher_entropy", "advantage"} <= set(table.column_names)
    brought(planned(tmp_path, "grade.beta_length=0", "grade.advantage=running"), "grade")
    with pytest.raises(StoreError, match="changed since its round was committed"):
        round_table(work.store, 0)


def test_rounds_walk_through_the_source_and_a_rerun_meets_the_same_problems(tmp_path):
    first, second = planned(tmp_path), planned(tmp_path, number=1)
    assert not {i for s in first.shards.values() for i in s} & {i for s in second.shards.values() for i in s}
    assert open_round(first.store, first.run, "rounds", 1).shards == second.shards
    with pytest.raises(UserError, match="no round 5"):
        open_round(first.store, first.run, "rounds", 5)


def test_the_running_baseline_folds_all_earlier_rewards_and_is_kept(tmp_path):
    sets = ("grade.advantage=running", "grade.answer_pattern=(.)$")
    graded = []
    for number in range(3):
        work = planned(tmp_path, *sets, number=number)
        state = work.baseline
        expected = RunningBaseline()
        for earlier in graded:
            expected = expected.update(earlier)
        assert state == expected
        brought(work, *MEASURE)
        tables = [work.store.read(e, ["reward"]) for _, e in sorted(work.store.entries(work.area, "grade").items())]
        graded.append(pa.concat_tables(tables)["reward"].to_numpy())
    kept = work.store.read_json(f"{area('rounds', 1)}/baseline.json")
    assert kept["after"]["steps"] == 2
    assert stale(work) == {(name, shard): "missing" for name in LABELS for shard in work.shards}
