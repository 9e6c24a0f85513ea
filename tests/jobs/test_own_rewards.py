"""The example of rewards in jobs/README.md, run as it stands: real Ray Data and trainer, the fake engine."""

import re
from pathlib import Path

import pytest

from actors.fakes import UNWATCHED, FakeEngine
from jobs import distill, export, stage, status, verify
from jobs.settle import Choices
from pipeline.errors import SettingError
from pipeline.store.directory import Store

README = (Path(__file__).parents[2] / "jobs" / "README.md").read_text()
SMALL = [
    *UNWATCHED,
    "rollout.prompts_per_round=4",
    "rollout.prompts_per_shard=2",
    "rollout.group_size=4",
    "train.batch_traces=8",
    "evaluation.problems=8",
]
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A folder with the two files of the example, in which the commands run."""
    section = README.partition("\n## Rewards\n")[2].partition("\n## ")[0]
    (tmp_path / "rewards.yaml").write_text(re.search(r"```yaml\n(.*?)```", section, re.DOTALL)[1])
    (tmp_path / "steps.py").write_text(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_trains_and_a_changed_weight_needs_no_engine(example, ray_local, trained_here, capfd):
    distill.distill("runs/rewards", Choices("demo", SMALL, "rewards.yaml"), engine_class=FakeEngine)
    store = Store("runs/rewards")
    assert store.latest_policy() == 2
    table = store.read(store.entries("rounds/0001", "reward")["0000"])
    assert {"reward_accuracy", "reward_steps", "reward_long"} <= set(table.column_names)
    assert set(table["reward_steps"].to_pylist()) <= {0.0, 1.0, None}
    assert not store.names("evals/0000/reward")
    (example / "steps.py").rename(example / "gone.py")  # a new weight needs no function
    capfd.readouterr()
    stage.run_stage("runs/rewards", stage.Redo("grade", "0", ["grade.rewards.steps.weight=0.5"]))
    said = " ".join(capfd.readouterr().out.split())
    assert "run.json: grade.rewards.steps.weight was 0.2, now 0.5." in said
    assert "rounds/0000 grade: 2 shards computed (16 rows), 0 fresh." in said
    status.show("runs/rewards", False)
    said = " ".join(capfd.readouterr().out.split())
    assert "reward" in said
    assert "stale: grade of round 1, 2 of 2 shards (settings)" in said
    assert "rounds/0000 reward" not in said
    verify.verify_run("runs/rewards", False)
    export.export_run("runs/rewards", "out", False)
    (example / "steps.py").write_text("def steps(completions, most):\n    return [1.0] * len(completions)\n")
    status.show("runs/rewards", False)
    said = " ".join(capfd.readouterr().out.split())
    assert "stale: reward of rounds 0 to 1, 4 of 4 shards (reward_steps changed)" in said


def test_the_example_without_its_file_is_refused_before_anything_starts(example):
    (example / "steps.py").unlink()
    with pytest.raises(SettingError, match=r"grade.rewards.steps: steps.py cannot be read: No such file or directory"):
        distill.distill("runs/none", Choices("demo", SMALL, "rewards.yaml"), engine_class=FakeEngine, debug=True)
    assert not (example / "runs" / "none" / "rounds").exists()
