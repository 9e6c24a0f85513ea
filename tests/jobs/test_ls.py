"""`egrsd ls`: the names of runs stay whole, also where the terminal is narrow."""

import pytest
from other_user import other_user, seen_by_all

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


def test_a_folder_that_may_not_be_read_is_passed_over_and_named(capfd):
    """One folder of a colleague, or `lost+found`, was an internal error, and no run was shown."""
    with seen_by_all() as folder:
        Store(f"{folder}/demo").save_run(demo(), {})
        (folder / "theirs").mkdir(mode=0)
        with other_user():
            list_runs(str(folder), False)
            said = capfd.readouterr().out
            with pytest.raises(SystemExit) as ended:
                list_runs(f"{folder}/theirs", False)
        assert f"passed over, since they may not be read: {folder}/theirs." in said
        assert f"{folder}/demo " in said
        assert ended.value.code == 2
        assert capfd.readouterr().err.startswith(f"error: {folder}/theirs/: cannot list (")


@pytest.mark.parametrize(("uri", "name"), [("/x/runs/a/demo", "a/demo"), ("/x/runs", "runs")])
def test_a_name_from_a_folder(uri, name):
    assert below("/x/runs", uri) == name
    assert below("/x/runs/", uri) == name
