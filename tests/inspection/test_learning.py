"""Figures by round from the metrics alone, their sparkline, and the list of runs below a folder."""

import json
import os

from pipeline.inspection.learning import by_round, listed, sparkline
from pipeline.live.lease import LEASE
from pipeline.recipes import demo
from pipeline.store import owner
from pipeline.store.directory import Store


def run_at(folder, accuracies=()):
    store = Store(str(folder))
    store.save_run(demo(), {})
    for number, accuracy in enumerate(accuracies):
        store.write_metrics("round", number, [{"round": number, "accuracy": accuracy, "mean_length": 40.0 - number}])
        steps = [{"round": number, "step": 2 * number, "logprob_gap": 0.25}, {"round": number, "step": 2 * number + 1}]
        store.write_metrics("train", number, steps)
    return store


def test_figures_by_round(tmp_path):
    figures = by_round(run_at(tmp_path / "a", [0.5, 0.75]))
    assert figures["accuracy"] == {0: 0.5, 1: 0.75}
    assert figures["mean_length"] == {0: 40.0, 1: 39.0}
    assert figures["logprob_gap"] == {0: 0.25, 1: 0.25}  # of the first step, which alone has one
    assert figures["teacher_entropy"] == {}


def test_a_sparkline_goes_from_the_least_to_the_largest():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([3.0, 3.0]) == "▄▄"
    assert sparkline([]) == ""
    long = sparkline([float(number) for number in range(1000)])
    assert len(long) == 32
    assert long == "".join(sorted(long))


def test_the_runs_below_a_folder(tmp_path):
    run_at(tmp_path / "b/deep", [0.25])
    run_at(tmp_path / "a", [])
    run_at(tmp_path / "a/inside", [])  # a run is not looked into
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "c/run.json").write_text(json.dumps({"settings": 1}))
    first, second, broken = listed(str(tmp_path))
    assert (first.uri, first.state, first.accuracy) == (str(tmp_path / "a"), "new", None)
    assert (second.uri, second.rounds, second.of, second.accuracy, second.length) == (str(tmp_path / "b/deep"), 0, 16, 0.25, 40.0)
    assert second.when
    assert broken.state.startswith("damaged: ")
    config = demo().model_dump(mode="json") | {"brand_new": 5}
    (tmp_path / "c/run.json").write_text(json.dumps({"config": config, "versions": {}}))
    *_, later = listed(str(tmp_path))
    assert later.state.startswith("the setting brand_new is unknown to this code, egrsd")


def test_a_lease_of_another_machine_says_when_its_last_beat_was(tmp_path):
    """Its pod may have been evicted, or the run was copied: "at work" was said for ever."""
    store = run_at(tmp_path / "a")
    lease = {"token": "x", "holder": "process 1 on far", "host": "far", "pid": 1, "beats": 7}
    store.write_json(LEASE, lease)
    os.utime(store.local_root / LEASE, (1_000_000_000, 1_000_000_000))
    assert next(listed(store.uri)).state == "held by process 1 on far, last beat 2001-09-09 01:46 UTC"
    store.write_json(LEASE, lease | {"host": owner.host(), "pid": os.getpid()})
    assert next(listed(store.uri)).state == "at work: process 1 on far"


def test_a_folder_without_runs_is_empty(tmp_path):
    assert list(listed(str(tmp_path / "nowhere"))) == []
