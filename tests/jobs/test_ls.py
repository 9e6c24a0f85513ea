"""`egrsd ls`: the names of runs stay whole, also where the terminal is narrow."""

import contextlib
import os
import tempfile
from pathlib import Path

import pytest

from jobs.ls import below, list_runs
from pipeline.recipes import demo
from pipeline.store.directory import Store


def test_names_are_told_from_the_folder_where_it_is_too_narrow_and_are_never_cut(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / ("a-long-folder-" * 5)
    for name in ("first-of-two-runs-with-long-names", "deeper/second-of-two-runs-with-long-names"):
        Store(str(folder / name)).save_run(demo(), {})
    list_runs(str(folder), False)
    said = capfd.readouterr().out
    assert "\nfirst-of-two-runs-with-long-names " in said
    assert "\ndeeper/second-of-two-runs-with-long-names " in said
    assert f"runs are named from {folder}" in said


def test_whole_names_stay_where_there_is_room(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    Store(str(tmp_path / "demo")).save_run(demo(), {})
    list_runs(str(tmp_path), False)
    assert f"\n{tmp_path / 'demo'} " in capfd.readouterr().out


@contextlib.contextmanager
def of_somebody_else(path):
    """A folder without rights, read by a user who has no more than others have."""
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(0o755)


def test_a_folder_that_may_not_be_read_is_passed_over_and_named(capfd):
    """One folder of a colleague, or `lost+found`, was an internal error, and no run was shown."""
    with tempfile.TemporaryDirectory() as made:  # the folders above `tmp_path` are of one user
        folder = Path(made)
        folder.chmod(0o755)
        Store(made + "/demo").save_run(demo(), {})
        (folder / "theirs").mkdir()
        with of_somebody_else(folder / "theirs"):
            list_runs(made, False)
            said = capfd.readouterr().out
            assert f"passed over, since they may not be read: {folder / 'theirs'}." in said
            assert f"{folder / 'demo'} " in said
            with pytest.raises(SystemExit) as ended:
                list_runs(str(folder / "theirs"), False)
        assert ended.value.code == 2
        assert "cannot list (Permission denied)" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(("uri", "name"), [("/x/runs/a/demo", "a/demo"), ("/x/runs", "runs")])
def test_a_name_from_a_folder(uri, name):
    assert below("/x/runs", uri) == name
    assert below("/x/runs/", uri) == name
