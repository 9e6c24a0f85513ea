"""`egrsd stage` without engines: it starts in no time, since it needs neither Ray nor torch."""

import contextlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.compute as pc
import pytest
from filled_runs import Killed, measured, planner_of, run_at
from in_process import brought, planned

from actors.fakes import FakeEngine
from jobs import distill
from jobs import stage as job
from jobs.settle import Choices
from jobs.stage import Redo, run_stage
from pipeline.errors import SettingError
from pipeline.inspection import learning
from pipeline.inspection.proof import prove
from pipeline.models.resolve import asset_path
from pipeline.rounds import contents
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.metrics import summarise_round, withdraw
from pipeline.rounds.round import open_round
from pipeline.stages import STAGES
from pipeline.store.directory import Store
from pipeline.store.manifest import Origin

STORED = Path(__file__).parents[1] / "stored_run" / "group.tar.xz"
CODE = """
import sys
from jobs.stage import Redo, run_stage
run_stage(sys.argv[1], Redo(sys.argv[2], '0', sys.argv[3:], force=True))
print("imported:", sorted({"ray", "torch", "transformers", "vllm"} & set(sys.modules)))
"""


@pytest.fixture
def store(tmp_path):
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    return Store(str(tmp_path / "group"))


@pytest.mark.parametrize(("stage", "sets"), [("prompts", []), ("grade", []), ("label", ["label.gamma=1.0"])])
def test_a_stage_of_few_shards_imports_neither_ray_nor_torch_and_writes_the_same_bytes(store, stage, sets):
    before = {shard: entry.sha256 for shard, entry in store.entries("rounds/0000", stage).items()}
    done = subprocess.run([sys.executable, "-c", CODE, store.uri, stage, *sets], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"rounds/0000 {stage}: {len(before)} shards computed" in done.stdout
    assert "imported: []" in done.stdout
    after = {shard: entry.sha256 for shard, entry in store.entries("rounds/0000", stage).items()}
    assert (after == before) == (not sets)
    assert ("--set label.gamma=0.3`." in done.stdout) == bool(sets)


def row_of(store, number):
    """The figures and the times of a round, each by name."""
    [row] = [row for row in store.metrics(number) if row["writer"] == "round"] or [{}]
    times = {name: value for name, value in row.items() if name.startswith("seconds_")}
    return {name: value for name, value in row.items() if name not in {"writer", "round", *times}}, times


NOTHING = ["grade.answer_pattern=(never there)"]


def test_figures_are_those_of_the_new_verdicts_and_the_times_stay(store):
    """`status`, `ls` and the table at the end showed the accuracy of before, and `report` that of now."""
    before = {number: row_of(store, number) for number in (0, 1)}
    assert before[0][0]["accuracy"] > 0
    run_stage(store.uri, Redo("grade", "0..1", NOTHING), debug=True)
    for number in (0, 1):
        figures, times = row_of(store, number)
        assert figures == summarise_round(open_round(store, store.load_run(), "rounds", number))
        assert (figures["accuracy"], times) == (0.0, before[number][1])
    assert set(learning.by_round(store)["accuracy"].values()) == {0.0}


def test_old_figures_do_not_outlive_a_command_that_is_killed_and_the_next_one_writes_the_new_ones(store, monkeypatch, capfd):
    times = row_of(store, 0)[1]

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(job, "execute", killed)
        with pytest.raises(Killed):
            run_stage(store.uri, Redo("grade", "0", force=True), debug=True)
    assert row_of(store, 0) == ({}, times)
    assert not [line for line in prove(store, store.load_run()).findings if "metrics" in line]
    distill.distill(store.uri, Choices(), debug=True)
    assert "2 training rounds of" in capfd.readouterr().out
    assert row_of(store, 0) == (summarise_round(open_round(store, store.load_run(), "rounds", 0)), times)


def test_a_round_whose_shards_are_not_of_one_another_has_no_figures(store):
    """A trace_id stays when its trace is written again, so new traces would be counted with verdicts of the old ones."""
    entry = store.entry("rounds/0000", "rollout", "0000")
    table = store.read(entry)
    place = table.schema.get_field_index("response_text")
    again = table.set_column(place, table.schema.field(place), pc.ascii_upper(table["response_text"]))
    store.commit("rounds/0000", STAGES["rollout"], "0000", again, Origin(entry.settings, entry.inputs, 1.0, entry.facts))
    run_stage(store.uri, Redo("grade", "0"), debug=True)
    assert Inventory(open_round(store, store.load_run(), "rounds", 0)).is_fresh("grade", "profile")
    assert row_of(store, 0)[0] == {}  # they are profiled by signals of the old traces


def test_times_of_engines_do_not_stay_beside_new_traces(store):
    withdraw(open_round(store, store.load_run(), "rounds", 0), times=False)
    assert row_of(store, 0) == ({}, {})
    assert row_of(store, 1)[0]


def test_engines_are_loaded_once_for_all_rounds_and_stages(ray_local, tmp_path, monkeypatch):
    """`egrsd stage rollout,score --round 0..15` loaded them 32 times."""
    store, run = run_at(tmp_path)
    planner, pool = planner_of(store, run), FakeEngine(run.model, run.engines.rollout, run.score)
    for number in range(2):
        measured(planner, planner.plan(number, 0), engine=pool)
    opened = []

    @contextlib.contextmanager
    def engines(*_, asking, **__):
        opened.append(tuple(asking))
        yield {"rollout": pool, "score": pool}
        opened.append("closed")

    monkeypatch.setattr(job, "open_engines", engines)
    run_stage(store.uri, Redo("rollout,grade,score", "0..1", force=True), debug=True)
    assert opened == [("rollout", "score"), "closed"]


def test_a_round_is_graded_with_the_baseline_that_the_rounds_before_it_leave(tmp_path):
    """All rounds were opened first, so each was graded with the old state and stayed stale: one round a run was mended."""
    with tarfile.open(STORED.with_name("running.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    store = Store(str(tmp_path / "running"))
    run_stage(store.uri, Redo("grade", "1,0", ["grade.beta_length=0.01"]), debug=True)
    works = [open_round(store, store.load_run(), "rounds", number) for number in (0, 1)]
    assert [dict(Inventory(work).reasons("grade")) for work in works] == [{}, {}]
    assert {entry.settings for work in works for entry in store.entries(work.area, "grade").values()} == {
        Inventory(works[0]).settings(STAGES["grade"])
    }


@pytest.mark.parametrize("stages", ["reward", "prompts,rollout,reward"])
def test_rewards_are_tried_before_the_first_of_several_stages(tmp_path, stages):
    """Only a list that began with `reward` did. A function that raises was found after all traces had been written anew."""
    file = tmp_path / "mine.py"
    file.write_text("def mine(completions):\n    return [1.0] * len(completions)\n")
    work = planned(tmp_path / "run", f"grade.rewards=[{{name: mine, function: '{file}'}}]")
    work.store.save_run(work.run, {})
    brought(work, "prompts", "rollout")
    before = work.store.entries(work.area, "prompts")
    file.write_text("def mine(completions):\n    raise KeyError('x')\n")
    with pytest.raises(SettingError, match=r"grade\.rewards\.mine: raised KeyError"):
        run_stage(work.store.uri, Redo(stages, "0", force=True), debug=True)
    assert work.store.entries(work.area, "prompts") == before
    assert not work.store.entries(work.area, "reward")


def refused(store, capfd, *asked):
    """What `stage` says when it ends, in one line. No shard is touched."""
    before = store.entries("rounds/0000", "prompts")
    with pytest.raises(SystemExit) as ended:
        run_stage(store.uri, Redo(*asked))
    assert ended.value.code == 2
    assert store.entries("rounds/0000", "prompts") == before
    return " ".join("".join(capfd.readouterr()).split())


def test_a_source_that_has_fewer_rows_than_the_plans_name_is_refused_before_a_shard_is_made(store, capfd):
    """It was an IndexError, "row 83 of a source of 50", after the rounds before that one were made anew."""
    said = refused(store, capfd, "prompts", "0..1", ["source.size=2"], True)
    assert "tiny-arithmetic: has 2 rows by now, and rounds/0000 asks row" in said
    assert "Internal error" not in said


def test_a_changed_teacher_accepts_no_other_student(store, capfd, tmp_path):
    run = store.load_run()
    now = contents.look(run)["model.path"]
    contents.keep(store, run, {"model.path": now.model_copy(update={"weights": {"model.safetensors": "a" * 64}})})
    teacher = [f"teachers.big.model={shutil.copytree(asset_path(), tmp_path / 'big')}", "teachers.big.engines={}"]
    said = refused(store, capfd, "prompts", "0", teacher, True)
    assert "model.path tiny-reasoner has other files than the run was made with: model.safetensors" in said
