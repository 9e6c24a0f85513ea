"""`egrsd sweep` over objectives on a run of earlier code: cosines and effective tokens of the gradients that training takes."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jobs import sweep as job
from pipeline.errors import SettingError, UserError
from pipeline.evidence import objectives
from pipeline.evidence.sweep import first_step, is_kept
from pipeline.overrides import resolve
from pipeline.recipes import demo
from pipeline.store.directory import Store
from pipeline.store.folders import drop_weights

STORED = Path(__file__).parents[1] / "stored_run" / "group.tar.xz"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    with tarfile.open(STORED) as archive:
        archive.extractall(folder, filter="data")
    return Store(str(folder / "group"))


def test_objectives_are_compared_by_the_gradients_of_training(stored, capfd):
    sets = ["objective.name=grpo,egrsd,cl_egrsd", "objective.gate=own,entropy"]
    job.sweep_run(stored.uri, sets, [0], 16, True)
    document = stored.read_json(objectives.EVIDENCE)
    kept = [point["settings"] for point in document["points"]]
    named = [(settings["objective.name"], settings["objective.gate"]) for settings in kept]
    # the gate `entropy` of egrsd and cl_egrsd is their own: each objective comes once
    assert named == [("grpo", "own"), ("grpo", "entropy"), ("egrsd", "own"), ("cl_egrsd", "own")]
    cosines = np.array(document["cosines"])
    np.testing.assert_allclose(cosines, cosines.T, atol=1e-5)
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-5)
    assert document["points"][0]["cosine"] == [pytest.approx(1, abs=1e-5)]
    assert 0.5 < cosines[0, 2] < 0.9999
    assert document["traces"] == 16
    assert 0 < document["points"][0]["effective_share"] <= 1
    assert "cosines with the first" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["objective.name=grpo", "label.gamma=0,1"], "cannot be mixed.*one after another"),
        (["objective.name=grpo,"], "written once, as name=value,value"),
        (["objective.name=grpo,fkl"], "egrsd stage score --round N --set score.keep_topk=16"),
        (["objective.name=grpo,opd", "objective.gkd_beta=0,1"], "does not read this setting.*It is read by: gkd"),
        (["objective.name=grpo", "objective.control=shuffled"], "'grpo' has no gate"),
        (["objective.opd_coefficient=" + ",".join(map(str, range(1, 80)))], "more than 64"),
    ],
)
def test_what_cannot_be_swept_is_refused(stored, sets, message):
    with pytest.raises(SettingError, match=message):
        job.sweep_run(stored.uri, sets, None, 8, True)


def test_a_setting_that_only_some_objectives_read_makes_no_copies_of_the_others():
    base = resolve(demo(), ["score.keep_topk=16"])
    points = objectives.grid(base, ["objective.name=grpo,gkd", "objective.gkd_beta=0,.5,1"])
    assert [tuple(point.settings.values()) for point in points] == [("grpo", "0"), ("gkd", "0"), ("gkd", ".5"), ("gkd", "1")]


def test_a_later_round_is_computed_at_its_own_step(stored):
    """`rlsd` forgets the magnitude over its first steps. All rounds were computed at step 0."""
    sets = ["objective.name=grpo,rlsd", "objective.rlsd_decay_steps=1"]
    run = stored.load_run()
    works = job.choose_rounds(stored, run, [1])
    assert first_step(works[0]) >= 1
    found = objectives.measure(run, objectives.grid(run, sets), works, 8)
    assert found["points"][1]["cosine"] == [pytest.approx(1, abs=1e-5)]
    early = objectives.measure(run, objectives.grid(run, sets), job.choose_rounds(stored, run, [0]), 8)
    assert early["points"][1]["cosine"][0] < 0.9999


def test_a_round_whose_policy_was_dropped_is_left_out(stored, tmp_path):
    """The manifest of a dropped policy stays, so its round was chosen, and the sweep failed at its end."""
    store = Store(str(shutil.copytree(stored.uri, tmp_path / "run")))
    run = store.load_run()
    works = job.choose_rounds(store, run, None)
    assert [is_kept(work) for work in works[:2]] == [True, True]
    drop_weights(store, "policy/0001")
    assert [is_kept(work) for work in works[:2]] == [True, False]
    found = objectives.measure(run, objectives.grid(run, ["objective.name=grpo,rlsd"]), works[:2], 8)
    assert found["rounds"] == [0]


def test_a_round_whose_policy_was_trained_again_is_left_out(stored, tmp_path):
    """The new policy 1 was taken for the one that wrote the round, and its gradients for those of these traces."""
    store = Store(str(shutil.copytree(stored.uri, tmp_path / "run")))
    shutil.rmtree(tmp_path / "run" / "policy" / "0001")
    shutil.copytree(tmp_path / "run" / "policy" / "0002", tmp_path / "run" / "policy" / "0001")
    run = store.load_run()
    works = job.choose_rounds(store, run, None)
    assert [is_kept(work) for work in works[:2]] == [True, False]
    points = objectives.grid(run, ["objective.name=grpo,rlsd"])
    assert objectives.measure(run, points, works[:2], 8)["rounds"] == [0]
    with pytest.raises(UserError, match=r"every policy that wrote these rounds was dropped .* or trained again.*Sweep other"):
        objectives.measure(run, points, works[1:2], 8)
    found = job.gradient_cosines(job.read(run, works[:2]), job.grid(run, {"label.gamma": [0.3]}), 8)
    assert list(found) == ["0"]


def test_objectives_without_a_common_trace_are_told(stored):
    run = resolve(stored.load_run(), ["rollout.teacher_share=0.5"])
    works = job.choose_rounds(stored, run, [0])
    with pytest.raises(UserError, match="no trace is there from which all these objectives may learn"):
        objectives.measure(run, objectives.grid(run, ["objective.name=grpo,sft"]), works, 8)
