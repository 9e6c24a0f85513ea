"""Before Ray starts on this machine: folders that take no files are named, and a token is offered to a cluster that is joined."""

import os

import pytest

from actors import cluster, watch
from pipeline.errors import ClusterError, UserError
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


def test_folders_that_take_files_are_fine(home, monkeypatch):
    monkeypatch.setattr(cluster, "ROOM_BYTES", 1)
    cluster.check_folders()


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR", "HOME"])
def test_a_folder_that_takes_no_file_is_named_with_its_variable(home, monkeypatch, name):
    monkeypatch.setattr(cluster, "ROOM_BYTES", 1)
    monkeypatch.setenv(name, "/proc/1")  # takes no files, not even those of root
    with pytest.raises(UserError, match=f"^{name} /proc/1: cannot write there") as told:
        cluster.check_folders()
    assert name in told.value.remedy


def test_a_full_temporary_folder_is_named_before_ray_starts(home, monkeypatch):
    monkeypatch.setattr(cluster, "ROOM_BYTES", 1 << 60)
    with pytest.raises(UserError, match=r"no space left: .* MiB are free") as told:
        cluster.check_folders()
    assert told.value.where == f"TMPDIR {home.parent}"


def test_a_ray_that_does_not_start_here_is_not_a_cluster_that_does_not_answer(monkeypatch):
    def fail(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fail)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=r"Ray did not start on this machine .* timed out during startup"):
        cluster.connect(None)
    monkeypatch.setattr(watch, "_FULL_BYTES", 1 << 60)
    with pytest.raises(ClusterError, match="no space left"):
        cluster.connect(None)


def test_a_token_that_a_person_names_is_offered_to_a_cluster_that_is_joined(home, monkeypatch):
    """The file of an earlier local Ray is not: a driver in token mode cannot be called by a cluster without tokens."""
    modes = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: modes.append(cluster.os.environ.get("RAY_AUTH_MODE")))
    monkeypatch.setattr(cluster, "_check_answers", lambda _: None)
    cluster.connect("127.0.0.1:6379")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("x")
    cluster.connect("127.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    cluster.connect("127.0.0.1:6379")
    assert modes == [None, None, "token"]
    monkeypatch.delenv("RAY_AUTH_MODE")


@pytest.mark.parametrize("length", [20, 34, 39, 90])
def test_sockets_of_ray_fit_the_system_below_a_tmpdir_of_any_length(home, monkeypatch, length):
    folder = f"/tmp/{'x' * (length - 5)}"
    monkeypatch.setattr(private.Path, "mkdir", lambda *_, **__: None)
    monkeypatch.setattr(private.Path, "lstat", lambda _: os.stat(home.parent))
    monkeypatch.setattr(private.Path, "chmod", lambda *_: None)
    monkeypatch.setenv("TMPDIR", folder)
    socket = f"{cluster._ray_folder()}/session_2026-11-28_18-45-36_123456_{2**22}/sockets/plasma_store"
    assert len(socket) <= 107
    assert socket.startswith(folder) == (length < 35)


def test_a_ray_tmpdir_that_is_too_long_is_named(home, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * 60)
    with pytest.raises(UserError, match=r"^RAY_TMPDIR /x*: too long: Ray's sockets"):
        cluster.check_folders()
