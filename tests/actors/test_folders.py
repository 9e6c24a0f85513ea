"""Folders of this machine: those that take no files, or that others may change, are named before anything starts."""

import os

import pytest

from actors import folders
from pipeline.errors import UserError
from pipeline.store import private


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home without Ray's token, and a temporary folder."""
    for name in ("RAY_TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / "home"


def test_folders_that_take_files_are_fine_and_keep_nothing_of_the_check(home, monkeypatch):
    monkeypatch.setattr(folders, "ROOM_BYTES", 1)
    folders.check_folders()
    assert list(home.iterdir()) == []
    assert list(home.parent.iterdir()) == [home]


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR", "HOME"])
def test_a_folder_that_takes_no_file_is_named_with_its_variable(home, monkeypatch, name):
    monkeypatch.setattr(folders, "ROOM_BYTES", 1)
    monkeypatch.setenv(name, "/proc/1")  # takes no files, not even those of root
    with pytest.raises(UserError, match=f"^{name} /proc/1: cannot write there") as told:
        folders.check_folders()
    assert name in told.value.remedy


def test_a_full_temporary_folder_is_named_before_ray_starts(home, monkeypatch):
    monkeypatch.setattr(folders, "ROOM_BYTES", 1 << 60)
    with pytest.raises(UserError, match=r"no space left: .* MiB are free") as told:
        folders.check_folders()
    assert told.value.where == f"TMPDIR {home.parent}"


@pytest.mark.parametrize("length", [20, 34, 39, 90])
def test_sockets_of_ray_fit_the_system_below_a_tmpdir_of_any_length(home, monkeypatch, length):
    folder = f"/tmp/{'x' * (length - 5)}"
    monkeypatch.setattr(private.Path, "mkdir", lambda *_, **__: None)
    monkeypatch.setattr(private.Path, "lstat", lambda _: os.stat(home.parent))
    monkeypatch.setattr(private.Path, "chmod", lambda *_: None)
    monkeypatch.setenv("TMPDIR", folder)
    socket = f"{folders.ray_folder()}/session_2026-11-28_18-45-36_123456_{2**22}/sockets/plasma_store"
    assert len(socket) <= 107
    assert socket.startswith(folder) == (length < 35)


def test_a_ray_tmpdir_that_is_too_long_is_named(home, monkeypatch):
    """Ray makes `ray` in it. Four bytes too many went unseen, and Ray then said that no cluster answers."""
    longest = folders.MOST_PATH - len("/ray")
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * longest)
    with pytest.raises(UserError, match=rf"^RAY_TMPDIR /x*: too long: Ray's sockets .* allows {longest} bytes"):
        folders.check_folders()
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * (longest - 1))
    with pytest.raises(UserError, match=r"^RAY_TMPDIR /x*: (?!too long)"):
        folders.check_folders()
    socket = f"{folders.ray_folder()}/session_2026-11-28_18-45-36_123456_{2**22}/sockets/plasma_store"
    assert len(socket) == 107


class Usage:
    """What shutil.disk_usage tells of a folder with 3 GiB of free space."""

    free = 3 << 30


def levels():
    return {line.topic: (line.level, line.text) for line in folders.judge_folders()}


def test_doctor_shows_the_folders_that_a_run_will_use_with_their_free_space(home, monkeypatch):
    monkeypatch.setattr(folders, "ROOM_BYTES", 1)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: Usage)
    found = levels()
    own = home.parent / f"e-{os.geteuid()}"
    assert found["temporary files"] == ("ok", f"TMPDIR {home.parent}, 3.0 GiB free; yours alone: {own}")
    assert found["home"] == ("ok", f"HOME {home}, 3.0 GiB free")
    assert own.stat().st_mode & 0o777 == 0o700


def test_doctor_names_a_folder_without_room_or_that_somebody_else_may_change(home, monkeypatch):
    monkeypatch.setattr(folders, "ROOM_BYTES", 1)
    home.parent.chmod(0o777)
    level, text = levels()["temporary files"]
    assert (level, text.endswith(f"Everybody can replace your files there: chmod +t {home.parent}")) == ("warning", True)
    home.parent.chmod(0o1777)
    assert levels()["temporary files"][0] != "error"
    own = home.parent / f"e-{os.geteuid()}"
    own.rmdir()
    own.symlink_to(home)
    level, text = levels()["temporary files"]
    assert (level, "is not a folder that only you may change" in text) == ("error", True)
    monkeypatch.setattr(folders, "ROOM_BYTES", 1 << 60)
    level, text = levels()["temporary files"]
    assert (level, "no space left" in text) == ("error", True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_doctor_names_a_home_of_somebody_else(home):
    os.chown(home, 12345, -1)
    level, text = levels()["home"]
    assert (level, text.endswith("It belongs to user 12345, who can replace your files there")) == ("warning", True)
