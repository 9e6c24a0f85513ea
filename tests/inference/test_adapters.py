"""Policies on an object store: copied once, checked, and never served stale."""

import errno
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pyarrow import fs

from actors.inference import adapters
from pipeline.errors import ModelError, StoreError, UserError
from pipeline.store.directory import Store
from pipeline.store.files import Files
from pipeline.store.folders import NEEDED


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A run directory that is read as an object store is: through a file system that is not the local one."""
    disk = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    local = Files.opened.func
    opened = property(lambda self: (disk, self.uri.removeprefix("s3://")) if self.uri.startswith("s3://") else local(self))
    monkeypatch.setattr(Files, "opened", opened)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "bucket"


def publish(remote: Path, version: int, weights: bytes) -> str:
    folder = remote.parent / "adapter"
    folder.mkdir(exist_ok=True)
    for name in NEEDED["policy"]:
        (folder / name).write_bytes(weights)
    Store(str(remote)).publish_policy(version, folder)
    return f"s3://bucket/policy/{version:04d}"


def weights(folder: str) -> bytes:
    return Path(folder, "adapter_model.safetensors").read_bytes()


def test_a_policy_is_copied_once_and_again_when_it_is_published_again(remote):
    uri, other = publish(remote, 1, b"first"), publish(remote, 2, b"other")
    folder, content = adapters.fetch(uri)
    assert weights(folder) == b"first"
    Path(folder, "mark").touch()
    assert adapters.fetch(uri) == (folder, content)
    assert Path(folder, "mark").exists()
    adapters.fetch(other)
    publish(remote, 1, b"again")
    newer, newer_content = adapters.fetch(uri)
    assert weights(newer) == b"again"
    assert newer_content != content
    assert not Path(folder).exists()
    assert len(list((remote.parent / "cache").rglob("*.safetensors"))) == 2


def test_of_a_runs_policies_the_last_that_were_asked_for_stay(remote):
    uris = [publish(remote, version, b"%d" % version) for version in range(1, 6)]
    for uri in (*uris[:3], uris[0], *uris[3:]):
        adapters.fetch(uri, keep=3)
    kept = {path.read_bytes() for path in (remote.parent / "cache").rglob("*.safetensors")}
    assert kept == {b"1", b"4", b"5"}


@pytest.mark.parametrize("damage", ["other bytes", "same size and time", "gone", "a link"])
def test_a_damaged_copy_is_never_served_and_is_made_anew(remote, tmp_path, damage):
    uri = publish(remote, 1, b"first")
    folder, content = adapters.fetch(uri)
    file = Path(folder, "adapter_model.safetensors")
    before = file.stat()
    (tmp_path / "rival").write_bytes(b"rival")
    if damage in ("gone", "a link"):
        file.unlink()
    if damage == "a link":
        file.symlink_to(tmp_path / "rival")
    elif damage != "gone":
        file.write_bytes(b"rival")
        if damage == "same size and time":
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert adapters.fetch(uri) == (folder, content)
    assert weights(folder) == b"first"
    assert not file.is_symlink()


def test_copies_lie_in_a_folder_of_this_user_alone(remote):
    folder = Path(adapters.fetch(publish(remote, 1, b"first"))[0])
    for parent in (folder.parent, folder.parent.parent, folder.parent.parent.parent):
        assert parent.stat().st_mode & 0o777 == 0o700
    assert folder.parent.parent.parent.name == f"e-{os.geteuid()}"


@pytest.mark.parametrize("rival", ["a link", "writable by others", "another owner", "a file"])
def test_a_folder_that_somebody_else_prepared_is_refused(remote, tmp_path, monkeypatch, rival):
    uri = publish(remote, 1, b"first")
    folder = remote.parent / "cache" / f"e-{os.geteuid()}"
    if rival == "a link":
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs")
    elif rival == "a file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777 if rival == "writable by others" else 0o755)
    if rival == "another owner":
        if os.geteuid():
            pytest.skip("only root can make a folder of another user")
        os.chown(folder, 12345, -1)
    with pytest.raises(UserError, match=r"Set TMPDIR|set TMPDIR"):
        adapters.fetch(uri)


def test_a_damaged_local_policy_is_named_at_its_next_use(remote):
    publish(remote, 1, b"first")
    folder = str(remote / "policy/0001")
    adapters.fetch(folder)
    (remote / "policy/0001/adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(StoreError, match=r"adapter_model\.safetensors: the file is missing or damaged"):
        adapters.fetch(folder)


def test_a_damaged_or_unpublished_policy_is_refused(remote):
    uri = publish(remote, 1, b"first")
    (remote / "policy/0001/adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(StoreError, match="missing or damaged"):
        adapters.fetch(uri)
    (remote / "policy/0001/manifest.json").unlink()
    with pytest.raises(StoreError, match=r"bucket/policy/0001: no policy is published here: manifest\.json is missing"):
        adapters.fetch(uri)


def test_a_local_policy_is_used_as_it_is_and_its_change_is_seen(remote):
    publish(remote, 1, b"first")
    folder = str(remote / "policy/0001")
    assert adapters.fetch(f"file://{folder}") == (found := adapters.fetch(folder))
    assert found[0] == folder
    publish(remote, 1, b"again")
    assert adapters.fetch(folder)[1] != found[1]


def test_an_adapter_configuration_that_is_torn_is_named(tmp_path):
    from pipeline.config import Model

    (tmp_path / "adapter_config.json").write_text('{"r": ')
    with pytest.raises(ModelError, match=r"s3://here: adapter_config\.json is not JSON"):
        adapters.check(str(tmp_path), "s3://here", Model(), 128)


def copying(monkeypatch, before=lambda: None):
    """The names of the policies that are copied from here on. `before` is called before each copy."""
    names, fetch_folder = [], adapters.fetch_folder

    def counted(files, name, *more):
        names.append(name)
        before()
        return fetch_folder(files, name, *more)

    monkeypatch.setattr(adapters, "fetch_folder", counted)
    return names


def test_of_the_engines_of_a_machine_one_makes_the_copy(remote, monkeypatch):
    """Each of eight engines copied 15 GB for itself, at the same time."""
    uri, names = publish(remote, 1, b"first"), copying(monkeypatch, lambda: time.sleep(0.3))
    with ThreadPoolExecutor(4) as engines:
        found = set(engines.map(adapters.fetch, [uri] * 4))
    assert (len(found), names) == (1, ["0001"])
    Path(*next(iter(found))[:1], "adapter_model.safetensors").write_bytes(b"rival")
    with ThreadPoolExecutor(4) as engines:
        assert set(engines.map(adapters.fetch, [uri] * 4)) == found
    assert names == ["0001"] * 2


def test_what_a_killed_engine_left_and_copies_of_runs_that_nobody_uses_go_with_the_next_copy(remote):
    folder = Path(adapters.fetch(publish(remote, 1, b"first"))[0])
    copies = folder.parent.parent
    left, old, used = copies / "part" / "egrsd-left", copies / "old" / "0001-x", copies / "used" / "0001-x"
    for path in (left, old, used):
        path.mkdir(parents=True)
        (path / "weights").write_bytes(bytes(9))
    for path in (old, old.parent, used.parent):
        os.utime(path, (0, time.time() - 90_000))
    adapters.fetch(publish(remote, 2, b"second"))
    assert sorted(path.name for path in copies.iterdir()) == sorted(["lock", "part", folder.parent.name, "used"])
    assert list((copies / "part").iterdir()) == []
    assert used.exists()


def test_a_disk_without_space_for_a_copy_is_named_with_its_node(remote, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    uri = publish(remote, 1, b"first")
    copying(monkeypatch, full)
    said = rf"0001-\w+: node {socket.gethostname()} cannot keep a copy of a policy \(No space left on device\)\. Free some space"
    with pytest.raises(StoreError, match=said):
        adapters.fetch(uri)


def test_a_machine_that_does_not_see_a_local_policy_is_named(tmp_path):
    """It was told to publish the adapter again."""
    said = rf"policy/0001: node {socket.gethostname()} does not see this policy\. Give --run a place that every node reaches"
    with pytest.raises(StoreError, match=said):
        adapters.fetch(str(tmp_path / "run/policy/0001"))
