"""`egrsd status`: learning first, then work, then what is stale with one command; `--watch` ends with the run."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from report_runs import GROUP, add_round, new_run

from jobs import status, summary
from jobs.screen.terminal import session
from pipeline.inspection import learning
from pipeline.inspection.staleness import Staleness
from pipeline.overrides import resolve
from pipeline.recipes import demo
from pipeline.store.directory import Store

STORED = Path(__file__).parents[1] / "stored_run" / "group.tar.xz"


@pytest.fixture
def store(tmp_path):
    """A run of two rounds that earlier code has made."""
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    return Store(str(tmp_path / "group"))


def test_learning_comes_first_then_work_then_what_is_stale_with_the_command_that_mends_it(store, capfd):
    store.save_run(resolve(store.load_run(), ["label.gamma=1"]), {})
    status.show(store.uri, False)
    said = capfd.readouterr().out
    places = [
        said.index(part) for part in ("2 of 2 rounds trained", "accuracy, %", "\nwork", "rejected:", "stale: label of", "mend: ")
    ]
    assert places == sorted(places)
    line = next(line for line in said.splitlines() if line.startswith("accuracy, %"))
    assert line.split()[2:] == ["37.5", "62.5", "▁█"]
    assert f"mend: `egrsd stage label --run {store.uri} --round 0..1`" in said


def test_bounds_in_the_place_of_exact_entropies_are_a_warning(tmp_path, capfd):
    store, run = new_run(tmp_path / "run")
    add_round(store, run, 0, [np.arange(3)] * GROUP, ["1+1"] * GROUP, ["1+1"], fallback="the hook is gone")
    status.show(store.uri, False)
    assert "warning: 1 of 1 shards: entropies are bounds and not exact (the hook is gone)." in " ".join(
        capfd.readouterr().out.split()
    )


def test_the_end_of_a_run_tells_bounds_of_all_rounds_once(tmp_path, capfd):
    """Whoever comes back after hours sees the last screen only."""
    store, run = new_run(tmp_path / "run", "rounds=2")
    for number in (0, 1):
        add_round(store, run, number, [np.arange(3)] * GROUP, ["1+1"] * GROUP, ["1+1"], fallback="the hook is gone")
    shutil.rmtree(tmp_path / "run" / "metrics")  # rounds made here have few of the figures that the table sums
    with session(False) as out:
        summary.summarise(store, run, out)
    said = " ".join(capfd.readouterr().out.split())
    assert said.count("the hook is gone") == 1
    assert "warning: rounds/0000 to rounds/0001, 2 of 2 shards: entropies are bounds and not exact (the hook is gone)." in said


def test_rounds_that_are_whole_and_trained_share_a_row(store):
    cell = {"rows": 16, "seconds": 1.5, "rejected": 1}
    rows = [
        {"round": n, "stages": {"rollout": cell}, "trained": f"policy {n + 1}", "behind": 0, "stale": n == 20} for n in range(30)
    ]
    seen = status.Seen(store, demo(), {}, ("rollout",), Staleness(store, demo()), rows)
    table = status._work(seen, "work")
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["0 to 19", "20", "21 to 29"]
    assert cells[1] == ["320 30.0s -20", "16 1.5s -1", "144 13.5s -9"]
    assert cells[2] == ["policy 20", "[yellow]policy 21 ![/yellow]", "policy 30"]
    assert status._cell({"rows": 64, "seconds": 460.5, "rejected": 8}) == "64 460s -8"
    assert status._cell({"rows": 64, "seconds": 12_345.0, "rejected": 0}) == "64 3.4h"
    found = {"prompts": cell, "score": cell | {"rejected": 3}, "label": cell | {"rejected": 3}}
    shown = list(status._cells(found, ("prompts", "rollout", "score", "label")))
    assert shown == ["16 1.5s -1", "-", "16 1.5s -3", "16 1.5s"]


def test_a_figure_that_a_round_lacks_is_no_figure_of_it(store):
    """The gap of round 0 stood under "round 1" too, where only round 0 was compared."""
    known = {0: 0.25, 1: 0.5}
    figures = {key: (known if key == "accuracy" else {0: 0.125}) for _, key, *_ in learning.MEASURES}
    seen = status.Seen(store, demo(), figures, (), Staleness(store, demo()), [])
    table = status._tables(seen)[0]
    cells = [list(column.cells) for column in table.columns]
    assert cells[1][0] != cells[2][0] != "-"
    assert set(cells[2][1:]) == {"-"}
    assert "-" not in cells[1]


def test_a_slow_round_fits_into_80_columns_and_the_seconds_are_explained(store, capfd):
    """A newcomer saw 460.5 s for a round that took 386, and the cell in two lines."""
    for name in ("rollout", "grade", "score", "profile", "label"):
        for shard, entry in store.entries("rounds/0000", name).items():
            document = store.read_json(f"rounds/0000/{name}/{shard}.json")
            slow = {"seconds": 230.25} if name in ("rollout", "score") else {}
            store.write_json(f"rounds/0000/{name}/{shard}.json", document | {"rejected": {"missing_answer": 8}} | slow)
            assert entry.rows
    status.show(store.uri, False)
    said = capfd.readouterr().out
    row = next(line for line in said.partition("\nwork")[2].splitlines() if line.split()[:1] == ["0"])
    assert "460s -16 " in row
    assert row.count("-16") == 1  # later stages pass the same rows by
    assert row.rstrip().endswith("policy 1")
    assert "two shards that wait for one engine count its time twice" in " ".join(said.split())


def test_the_end_of_a_run_names_the_next_commands_and_which_mean_is_shown(store, capfd):
    with session(False) as out:
        summary.summarise(store, store.load_run(), out)
    said = " ".join(capfd.readouterr().out.split())
    assert f"next: `egrsd report {store.uri}` shows every trace, `egrsd ask {store.uri} QUESTION` asks both ends." in said
    assert "fork (mean of rounds)" in said
    assert "log:" not in said  # this command wrote none


def test_a_watch_ends_when_the_run_is_done(store, tmp_path, capfd, monkeypatch):
    last, aside = Path(store.uri) / "policy/0002", tmp_path / "aside"
    last.rename(aside)
    slept = []

    def sleep(seconds):
        """What happens meanwhile: the trainer publishes its last policy."""
        slept.append(seconds)
        aside.rename(last)

    monkeypatch.setattr(status.time, "sleep", sleep)
    status.show(store.uri, False, watch=True)
    said = capfd.readouterr().out
    assert slept == [status.LOOK_S]
    assert "2 of 2 rounds trained" in said


def test_a_watch_in_json_tells_the_run_as_it_was_last_seen(store, egrsd):
    document = json.loads(egrsd("status", store.uri, "--watch", "--json").stdout)
    assert (document["exit_code"], document["result"]["trained"]) == (0, 2)
    assert document["result"] == json.loads(egrsd("status", store.uri, "--json").stdout)["result"]


def test_an_evaluation_counts_once_it_is_graded_and_policies_are_named(store, capfd):
    status.show(store.uri, False)
    said = capfd.readouterr().out
    assert "policies: 0 to 2. Evaluated: policy 0, policy 2." in said
    assert "held-out problems, policy 0: " in said
    for number in (0, 2):
        store.delete(f"evals/{number:04d}/grade")
    store.delete("policy")
    status.show(store.uri, False)
    assert "policies: policy 0 alone, the base. Evaluated: none yet." in capfd.readouterr().out
