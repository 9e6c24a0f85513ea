"""What `train --out` copies, and which folders count as replaced policies. The verb itself: tests/jobs/test_train.py."""

import pytest

from pipeline.store import replaced
from pipeline.store.directory import Store
from pipeline.store.folders import NEEDED
from pipeline.store.names import MODELS, SOURCES


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "run"))


def test_metrics_of_later_rounds_and_strange_names_stay(store, tmp_path):
    for name in ("0000-train", "0001-train", "9999-train", "10000-train", "10000-round", "notes-train"):
        store.write(f"metrics/{name}.jsonl", b"{}")
    for name in (SOURCES, MODELS):
        store.write_json(name, {})
    target = Store(str(tmp_path / "other"))
    replaced.copy_until(store, target, 1)
    assert target.names("metrics") == ["0000-train.jsonl", "10000-round.jsonl"]
    assert target.read_bytes(SOURCES) == target.read_bytes(MODELS) == b"{}"
    replaced.copy_until(store, target, 10000)
    assert "9999-train.jsonl" in target.names("metrics")
    assert "10000-train.jsonl" not in target.names("metrics")


def test_only_folders_that_were_set_aside_are_put_back_or_dropped(store, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    for name in NEEDED["train"]:
        (folder / name).write_bytes(b"x")
    store.publish_policy(10000, folder)
    store.save_state(10000, folder)
    replaced.set_aside(store, 3)
    assert store.numbers("policy") == []
    store.write("policy/notes.replaced-mine/x", b"x")
    assert "policies 10000 to 10000 and the settings are as they were before" in replaced.settle(store)
    assert store.latest_policy() == 10000
    assert store.has_state(10000)
    replaced.drop(store)
    assert store.names("policy") == ["10000", "notes.replaced-mine"]
