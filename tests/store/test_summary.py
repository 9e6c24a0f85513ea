"""The summary of a stage's entries spares reading them, and never hides what is true."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from score_shards import SCORE, commit, score_table

from pipeline.store.directory import Store
from pipeline.store.manifest import Origin


@pytest.fixture
def run_dir(tmp_path):
    return Store(str(tmp_path / "run"))


def truth(target):
    """Entries as the files that hold them say."""
    names = target.names("rounds/0000/score")
    shards = [name[:-5] for name in names if name.endswith(".json")]
    return {shard: target.entry("rounds/0000", "score", shard) for shard in shards}


def summarised(target, shards=3):
    for number in range(shards):
        commit(target, shard=f"{number:04d}")
    target.summarise("rounds/0000", "score")


def test_a_summary_spares_reading_the_entries(run_dir, monkeypatch):
    summarised(run_dir)
    expected = truth(run_dir)
    monkeypatch.setattr(Store, "entry", None)
    assert run_dir.entries("rounds/0000", "score") == expected
    assert list(expected) == ["0000", "0001", "0002"]


def test_a_summary_never_hides_what_came_after_it(run_dir):
    summarised(run_dir)
    run_dir.commit("rounds/0000", SCORE, "0000", score_table(), Origin("other", {"rollout": "x"}, 0.1))
    commit(run_dir, score_table(teacher_entropy=[[0.5] * 4] * 3), shard="0001")
    run_dir.delete("rounds/0000/score/0002.json")
    commit(run_dir, shard="0003")
    found = run_dir.entries("rounds/0000", "score")
    assert found == truth(run_dir)
    assert (found["0000"].settings, list(found)) == ("other", ["0000", "0001", "0003"])


@pytest.mark.parametrize("steps", range(4))
def test_a_commit_that_dies_at_any_step_leaves_a_summary_that_tells_the_truth(run_dir, monkeypatch, steps):
    summarised(run_dir)
    left = iter(range(steps))

    def until_death(work):
        def step(self, *arguments):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return work(self, *arguments)

        return step

    monkeypatch.setattr(Store, "write", until_death(Store.write))
    monkeypatch.setattr(Store, "delete", until_death(Store.delete))
    died = False
    try:
        commit(run_dir, score_table(teacher_entropy=[[0.5] * 4] * 3))
    except KeyboardInterrupt:
        died = True
    monkeypatch.undo()
    assert died == (steps < 3)
    assert run_dir.entries("rounds/0000", "score") == truth(run_dir)
    run_dir.summarise("rounds/0000", "score")
    assert run_dir.entries("rounds/0000", "score") == truth(run_dir)


def test_a_summary_that_was_made_while_a_shard_changed_is_not_believed(run_dir, monkeypatch):
    summarised(run_dir)
    run_dir.delete("rounds/0000/score/summary")
    write = Store.write

    def overtaken(self, path, data):
        if path.endswith("summary"):
            monkeypatch.undo()
            commit(self, score_table(teacher_entropy=[[0.5] * 4] * 3))
        write(self, path, data)

    monkeypatch.setattr(Store, "write", overtaken)
    run_dir.summarise("rounds/0000", "score")
    assert run_dir.entries("rounds/0000", "score") == truth(run_dir)


def test_who_lists_while_another_commits_sees_one_commit_or_the_next(run_dir):
    summarised(run_dir)
    before = run_dir.entries("rounds/0000", "score")["0000"]
    tables = [score_table(teacher_entropy=[[k / 40 + 0.01] * 4] * 3) for k in range(40)]
    reader = Store(run_dir.uri)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [commit(run_dir, table) for table in tables])
        seen = []
        while not writing.done():
            seen.append(reader.entries("rounds/0000", "score")["0000"])
            reader.summarise("rounds/0000", "score")
        committed = writing.result()
    order = [[before, *committed].index(entry) for entry in seen]
    assert order == sorted(order)
    assert reader.entries("rounds/0000", "score") == truth(run_dir)
    assert reader.entries("rounds/0000", "score")["0000"] == committed[-1]


def test_a_damaged_summary_is_passed_over(run_dir):
    summarised(run_dir)
    path = run_dir.local_root / "rounds/0000/score/summary"
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole.replace(b'"rows": 3', b'"rows": 9', 1), b"", b"\n", b"x"):
        path.write_bytes(damaged)
        assert run_dir.entries("rounds/0000", "score") == truth(run_dir)
