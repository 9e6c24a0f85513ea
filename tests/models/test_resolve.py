"""A hub's model: what the local copy holds is found without the hub, and what it lacks is told apart from a wrong name."""

import json
import shutil
import subprocess
import sys

import pytest
from transformers import AutoConfig

from pipeline import recipes
from pipeline.config import Model
from pipeline.errors import ModelError, UnreachableError
from pipeline.models.resolve import asset_path, has_weights, local_folder, open_model

LOOK = """
import sys
from jobs.doctor import judge, judge_model, judge_tokenizer
from pipeline import recipes
from pipeline.config import Model
from pipeline.fit.machine import Facts
from pipeline.models.resolve import has_weights

facts = Facts("3.11.9", {}, 2, frozenset(), *[64 * 2**30] * 3, (), {})
for name in sys.argv[1:]:
    run = recipes.demo().model_copy(update={"model": Model(path=name, max_model_len=128)})
    lines = [*judge("tokenizer", lambda: [judge_tokenizer(run)]), *judge("model", lambda: judge_model(run, facts))]
    print(name, has_weights(run.model), *(f"{line.level}:{line.topic}" for line in lines))
"""


@pytest.fixture
def copies(tmp_path):
    """The hub's copy on this machine: one whole model, one without weights, one of whose two files of weights one is missing."""
    for name in ("whole", "light", "half"):
        folder = tmp_path / "hub" / f"models--some--{name}"
        shutil.copytree(
            asset_path(), folder / "snapshots" / "a1", ignore=shutil.ignore_patterns("*.safetensors" if name != "whole" else "-")
        )
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("a1")
    half = tmp_path / "hub" / "models--some--half" / "snapshots" / "a1"
    (half / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    (half / "1.safetensors").touch()
    return tmp_path


def test_doctor_works_with_what_the_local_copy_of_the_hub_holds(copies, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(copies))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    names = ["some/whole", "some/light", "some/half", "some/absent"]
    done = subprocess.run([sys.executable, "-c", LOOK, *names], capture_output=True, text=True, check=True)
    found = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    there = ["ok:tokenizer", "ok:engines.rollout", "ok:train", "ok:fit", "in", "memory", "ok:pace", "(estimate)"]
    assert found["some/whole"] == ["True", *there]
    assert found["some/light"] == found["some/half"] == ["False", *there, "warning:weights"]
    assert found["some/absent"] == ["False", "warning:tokenizer", "warning:model"]


def test_a_folder_that_is_no_model_is_not_taken_for_an_unreachable_hub(tmp_path, monkeypatch):
    with pytest.raises(ModelError) as told:
        open_model(AutoConfig, Model(path=str(tmp_path)), "configuration")
    assert not isinstance(told.value, UnreachableError)
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "gone"), recipes.smollm2().model.path):
        with pytest.raises(ModelError, match="there is no such folder"):
            open_model(AutoConfig, Model(path=path), "configuration")
    assert has_weights(Model())


def test_a_folder_that_is_not_there_names_both_settings_that_may_hold_it():
    with pytest.raises(ModelError, match=r"no such folder\. Set model\.path \(or teachers\.NAME\.model\) to a folder or hub id"):
        open_model(None, Model(path="/no/such"), "tokenizer")


def test_the_folder_of_a_hubs_model_is_that_of_its_revision(copies, monkeypatch):
    """An engine that goes back to the base read `main`, whatever model.revision says."""
    monkeypatch.setenv("HF_HOME", str(copies))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    snapshots = copies / "hub" / "models--some--light" / "snapshots"
    shutil.copytree(snapshots / "a1", snapshots / "b2")
    code = "from pipeline.config import Model\nfrom pipeline.models.resolve import local_folder\n"
    code += "for revision in (None, 'b2'):\n    print(local_folder(Model(path='some/light', revision=revision)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(snapshots / name) for name in ("a1", "b2")]
    assert local_folder(Model()) == str(asset_path())
