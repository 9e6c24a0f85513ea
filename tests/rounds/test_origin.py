"""A source that changes during a run is noticed: by `distill` before anything is paid, and by `status` without reading it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from jobs import compare
from pipeline.config import Source
from pipeline.errors import SourceError, StoreError
from pipeline.inspection.proof import prove
from pipeline.overrides import resolve
from pipeline.problems import sources
from pipeline.problems.sources import ProblemSet, open_source
from pipeline.recipes import demo
from pipeline.rounds import origin
from pipeline.rounds.plan import Plan, write_plan
from pipeline.store.directory import Store


def write(path: Path, answers: list[str]) -> None:
    rows = [{"problem": f"p{place}", "solution": "s", "answer": answer} for place, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def made(tmp_path):
    """(store, run, file of the source) of a run whose sources are kept."""
    file = tmp_path / "a.jsonl"
    write(file, ["1", "2"])
    run = resolve(demo(), [f"source.uri={file}", "evaluation.problems=0"])
    store = Store(str(tmp_path / "run"))
    origin.keep(store, {"source": open_source(run.source)})
    return store, run, file


def test_a_source_as_it_was_is_passed_over(made):
    store, run, _ = made
    assert origin.look(store, run) == []
    assert origin.refuse_changes(store, {"source": open_source(run.source)}, accept=False) == []


def test_a_changed_source_is_refused_until_it_is_accepted(made):
    store, run, file = made
    write(file, ["1", "3", "4"])
    opened = {"source": open_source(run.source)}
    with pytest.raises(SourceError, match=r"has other rows than those the run was made with \(2 rows before, 3 now\).*--accept"):
        origin.refuse_changes(store, opened, accept=False)
    assert len(origin.look(store, run)) == 1
    [said] = origin.refuse_changes(store, opened, accept=True)
    assert said.startswith("note: source ")
    origin.keep(store, opened)
    assert origin.look(store, run) == origin.changes(store, opened) == []


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_column_that_only_rewards_read_is_compared_too(tmp_path, kind):
    import datasets

    place = tmp_path / ("a.parquet" if kind == "parquet" else "saved")

    def write(tests: str) -> dict[str, ProblemSet]:
        rows = datasets.Dataset.from_list([{"problem": "p", "solution": "s", "answer": "1", "tests": tests}])
        if kind == "parquet":
            rows.to_parquet(str(place))
        else:
            shutil.rmtree(place, ignore_errors=True)
            rows.save_to_disk(str(place))
        return {"source": open_source(Source(uri=str(place)))}

    store = Store(str(tmp_path / "run"))
    origin.keep(store, write("[1]"))
    assert origin.changes(store, write("[2]"), rewards=True) == []  # no reward read it before
    origin.keep(store, write("[1]"), rewards=True)
    assert origin.changes(store, write("[1]"), rewards=True) == origin.changes(store, write("[2]")) == []
    with pytest.raises(SourceError, match="other values in the columns that are kept for rewards"):
        origin.refuse_changes(store, write("[2]"), accept=False, rewards=True)


def test_a_file_with_a_new_time_and_the_same_rows_is_told_without_reading_it(made):
    store, run, file = made
    os.utime(file, (1, 1))
    [said] = origin.look(store, run)
    assert "size or time" in said
    assert origin.changes(store, {"source": open_source(run.source)}) == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda entry: [1], "is not what belongs here"),
        (lambda entry: {"source": [entry]}, "source"),
        (lambda entry: {"source": entry | {"settings": None}}, "source.settings"),
        (lambda entry: {"source": entry | {"settings": {"x": None}}}, "source.settings: has no uri"),
        (lambda entry: {"source": {k: v for k, v in entry.items() if k != "fingerprint"}}, "source.fingerprint"),
        (lambda entry: {"source": entry | {"files": {"a": ["1", 2]}}}, "source.files.a.0"),
    ],
)
def test_a_damaged_file_is_refused_with_its_field(made, change, field):
    store, run, _ = made
    store.write_json(origin.SOURCES, change(store.read_json(origin.SOURCES)["source"]))
    opened = {"source": open_source(run.source)}
    for use in (origin.look, lambda *_: origin.keep(store, opened), lambda *_: origin.changes(store, opened)):
        with pytest.raises(StoreError, match=rf"sources\.json: {field}.*Restore the file"):
            use(store, run)
    assert any("sources.json" in line for line in prove(store, run).findings)


def test_a_source_that_cannot_be_reached_is_one_line(made, monkeypatch):
    store, run, _ = made

    def unreachable(*_):
        raise OSError("When getting information: AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr(sources, "_filesystem", unreachable)
    [said] = origin.look(store, run)
    assert "cannot be compared with what it was" in said
    assert "NETWORK_CONNECTION" in said


def test_a_verb_without_accept_changes_names_its_own_way_out(made):
    store, run, file = made
    write(file, ["1", "3"])
    with pytest.raises(SourceError, match=r"use another --out") as raised:
        origin.refuse_changes(store, {"source": open_source(run.source)}, accept=False, remedy=compare.ACCEPT)
    assert "--accept-changes" not in str(raised.value)
    assert "--run" not in str(raised.value)


def test_a_file_that_went_is_told(made):
    store, run, file = made
    file.unlink()
    [said] = origin.look(store, run)
    assert "has lost files: " in said


def test_a_run_that_moves_with_its_data_or_is_looked_at_from_elsewhere_has_lost_nothing(tmp_path, monkeypatch):
    (tmp_path / "home/data/deep").mkdir(parents=True)
    write(tmp_path / "home/data/a.jsonl", ["1"])
    write(tmp_path / "home/data/deep/b.jsonl", ["2"])
    monkeypatch.chdir(tmp_path / "home")
    for uri in ("data", "data/**/*.jsonl", "data/deep/b.jsonl"):
        run = resolve(demo(), [f"source.uri={uri}", "evaluation.problems=0"])
        origin.keep(Store("run"), {"source": open_source(run.source)})
        (tmp_path / "home").rename(tmp_path / "moved")
        monkeypatch.chdir(tmp_path / "moved")
        store = Store(str(tmp_path / "moved/run"))
        assert origin.look(store, run) == []
        monkeypatch.chdir(tmp_path)
        assert origin.look(store, run) == [f"source {uri} is not there, seen from {tmp_path}"]
        (tmp_path / "moved").rename(tmp_path / "home")
        monkeypatch.chdir(tmp_path / "home")


def test_whole_paths_that_early_versions_kept_are_read(tmp_path):
    (tmp_path / "data/deep").mkdir(parents=True)
    for name in ("a.jsonl", "deep/a.jsonl"):
        write(tmp_path / "data" / name, ["1"])
    run, store = resolve(demo(), [f"source.uri={tmp_path / 'data'}", "evaluation.problems=0"]), Store(str(tmp_path / "run"))
    origin.keep(store, {"source": open_source(run.source)})
    kept = store.read_json(origin.SOURCES)
    assert kept["source"]["files"].keys() == {"a.jsonl", "deep/a.jsonl"}
    kept["source"]["files"] = {f"{tmp_path}/data/{name}": stamp for name, stamp in kept["source"]["files"].items()}
    store.write_json(origin.SOURCES, kept)
    assert origin.look(store, run) == []
    (tmp_path / "data/deep/a.jsonl").unlink()
    assert origin.look(store, run) == [f"source {tmp_path / 'data'} has lost files: deep/a.jsonl"]


def test_other_settings_of_a_source_are_another_matter(made):
    store, run, _ = made
    assert origin.changes(store, {"source": open_source(Source(uri=run.source.uri, size=1))}) == []


def test_a_run_without_the_file_is_compared_by_its_plans(made):
    store, run, _ = made
    store.delete(origin.SOURCES)
    opened = {"source": open_source(run.source)}
    assert origin.changes(store, opened) == []
    write_plan(store, "rounds", 0, Plan(0, {"0000": [0]}))
    assert origin.changes(store, opened) == []  # a plan of an early version tells no source
    write_plan(store, "rounds", 1, Plan(0, {"0000": [0]}, opened["source"].fingerprint))
    assert origin.changes(store, opened) == []
    write_plan(store, "rounds", 2, Plan(0, {"0000": [0]}, "another"))
    assert len(origin.changes(store, opened)) == 1
