"""`egrsd stage` without engines: it starts in no time, since it needs neither Ray nor torch."""

import contextlib
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from filled_runs import measured, planner_of, run_at
from in_process import brought, planned

from actors.fakes import FakeEngine
from jobs import stage as job
from jobs.stage import Redo, run_stage
from pipeline.errors import SettingError
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import open_round
from pipeline.stages import STAGES
from pipeline.store.directory import Store

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


def test_engines_are_loaded_once_for_all_rounds_and_stages(ray_local, tmp_path, monkeypatch):
    """`egrsd stage rollout,score --round 0..15` loaded them 32 times."""
    store, run = run_at(tmp_path)
    planner, pool = planner_of(store, run), FakeEngine(run.model, run.engines.rollout, run.score)
    for number in range(2):
        measured(planner, planner.plan(number, 0), engine=pool)
    opened = []

    @contextlib.contextmanager
    def engines(*_, **__):
        opened.append("open")
        yield {"rollout": pool, "score": pool}
        opened.append("closed")

    monkeypatch.setattr(job, "open_engines", engines)
    run_stage(store.uri, Redo("rollout,grade,score", "0..1", force=True), debug=True)
    assert opened == ["open", "closed"]


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
