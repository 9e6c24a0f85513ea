"""The running reward state, folded over rounds."""

import pyarrow as pa
from in_process import SETS, brought, planned, stale

from pipeline.method.rewards import RunningBaseline
from pipeline.overrides import resolve
from pipeline.recipes import demo
from pipeline.rounds.baseline import baseline_at
from pipeline.stages import LABELS, MEASURE
from pipeline.store.directory import area


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


def test_a_state_that_was_changed_on_disk_is_folded_again(tmp_path):
    sets = ("grade.advantage=running", "grade.answer_pattern=(.)$")
    brought(planned(tmp_path, *sets), *MEASURE)
    right = planned(tmp_path, *sets, number=1).baseline
    store, name = planned(tmp_path, *sets, number=1).store, f"{area('rounds', 0)}/baseline.json"
    whole = store.read_json(name)
    for change in ({"mean": 1e300}, {"steps": 7}, {"count": 0}):
        store.write_json(name, whole | {"after": whole["after"] | change})
        assert baseline_at(store, resolve(demo(), [*SETS, *sets]), "rounds", 1) == right
        assert planned(tmp_path, *sets, number=1).baseline == right
        assert store.read_json(name) == whole


def test_a_file_of_an_early_version_has_no_proof_and_is_believed_by_who_only_reads(tmp_path):
    sets = ("grade.advantage=running", "grade.answer_pattern=(.)$")
    brought(planned(tmp_path, *sets), *MEASURE)
    store, name = planned(tmp_path, *sets, number=1).store, f"{area('rounds', 0)}/baseline.json"
    whole = store.read_json(name)
    early = {key: value for key, value in whole.items() if key != "proof"}
    store.write_json(name, early)
    assert baseline_at(store, resolve(demo(), [*SETS, *sets]), "rounds", 1).to_dict() == whole["after"]
    assert store.read_json(name) == early
    planned(tmp_path, *sets, number=1)  # who goes on with the run folds again, and proves it
    assert store.read_json(name) == whole
