"""Stored verdicts are graded again and compared, and nothing on the disk changes."""

from __future__ import annotations

import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from in_process import brought, planned
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from actors.fakes import FakeEngine
from jobs.cli import app
from jobs.regrade import _cells
from pipeline.contract import Failure
from pipeline.grader.verifier import Grader, grader_of
from pipeline.inspection.regrade import Change, Regraded, regrade
from pipeline.overrides import resolve
from pipeline.rounds.round import open_round, with_engines
from pipeline.store.directory import Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stored run of November 2026."""
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(Path(__file__).parents[1] / "stored_run/group.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "group"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_verdicts_of_a_stored_demo_stay(folder):
    store = Store(str(folder))
    work = open_round(store, store.load_run(), "rounds", 0)
    shards = list(regrade(work, grader_of(work.run)))
    assert sum(shard.rows for shard in shards) == 16
    assert not any(shard.changes for shard in shards)


def test_a_grader_that_reads_answers_otherwise_changes_verdicts_and_they_are_told(folder):
    store = Store(str(folder))
    work = open_round(store, store.load_run(), "rounds", 0)
    with closing(Grader("exact", r"(nothing)#")) as blind:
        changes = [change for shard in regrade(work, blind) for change in shard.changes]
    assert changes
    assert {change.new for change in changes} == {"unparsable"}
    assert {change.old for change in changes} <= {"correct", "wrong"}


def test_what_a_model_wrote_is_text_on_the_terminal():
    """`[/b]` ended the table in a traceback, and escape sequences reached the terminal."""
    change = Change("id", "gold [a]", "so it is \x1b[2J[/b] and [x]", "correct", "wrong")
    table = Table(*"abcde")
    table.add_row(*_cells(change))
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    assert "gold [a]" in captured.get()
    assert "[/b] and [x]" in captured.get()
    assert "\x1b" not in captured.get()


def test_the_command_shows_the_changes_and_writes_nothing(folder, capfd):
    before = content(folder)
    same = CliRunner().invoke(app, ["stage", "grade", "--run", str(folder), "--diff"])
    assert same.exit_code == 0, same.output
    assert "0 of 40 stored verdicts would change." in capfd.readouterr().out
    other = ["stage", "grade", "--run", str(folder), "--round", "0", "--diff", "--set", "grade.answer_pattern=(nothing)"]
    told = CliRunner().invoke(app, other)
    assert told.exit_code == 0, told.output
    assert "correct -> unparsable" in capfd.readouterr().out
    assert content(folder) == before


@pytest.mark.parametrize(
    ("arguments", "said"), [(["stage", "score", "--diff"], "has no verdicts"), (["stage", "grade"], "'--round' is missing")]
)
def test_what_cannot_be_compared_is_refused(folder, arguments, said, capfd):
    refused = CliRunner().invoke(app, [*arguments, "--run", str(folder)])
    assert refused.exit_code == 2
    assert said in refused.output + "".join(capfd.readouterr())


def test_settings_that_grading_does_not_read_are_refused(folder):
    refused = CliRunner().invoke(app, ["stage", "grade", "--run", str(folder), "--diff", "--set", "label.gamma=0.5"])
    assert refused.exit_code == 2
    assert resolve(Store(str(folder)).load_run(), []) == Store(str(folder)).load_run()


def test_shards_whose_traces_were_made_again_are_left_out_and_counted(tmp_path):
    work = planned(tmp_path)
    brought(work)
    again = with_engines(open_round(work.store, resolve(work.run, ["rollout.group_size=3"]), "rounds", 0), work.engines)
    brought(again, "rollout", force=True)
    shards = list(regrade(open_round(work.store, work.run, "rounds", 0), grader_of(work.run)))
    assert shards == [Regraded(0, [], stale=True)] * 2


def test_a_shard_without_a_live_row_has_nothing_to_compare(tmp_path):
    """Arrow takes no rows by a list without one: the verb ended with an internal error."""

    class Broken(FakeEngine):
        def generate(self, requests, policy, sampling):
            return [Failure("broken") for _ in requests]

    work = planned(tmp_path, engine=Broken)
    brought(work, "prompts", "rollout", "grade")
    assert list(regrade(work, grader_of(work.run))) == [Regraded(0, [])] * 2
