"""The running reward state, folded over rounds."""

import pyarrow as pa
from in_process import brought, planned, stale

from pipeline.method.rewards import RunningBaseline
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
