"""A Ray that does not start here is told as such, and a token is offered to a cluster that is joined."""

import contextlib
import os

import pytest
import ray
from ray._private import auto_init_hook
from ray.exceptions import RayError
from waiting import until

from actors import cluster, watch
from pipeline import notices
from pipeline.errors import ClusterError


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home without Ray's token, and a temporary folder."""
    for name in ("RAY_TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / "home"


@pytest.fixture(scope="module", autouse=True)
def mode():
    """Ray's mode of tokens before the first test of this module."""
    return os.environ.get("RAY_AUTH_MODE")


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


def test_workers_read_text_as_utf_8_whatever_the_locale(home, monkeypatch):
    """With LC_ALL=C "vLLM did not start (UnicodeDecodeError ...)"."""
    given = {}
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: given.update(options["runtime_env"]["env_vars"]))
    cluster.connect("local", {"ONE": "1"})
    assert (given["PYTHONUTF8"], given["ONE"]) == ("1", "1")


def test_the_tests_before_left_the_token_mode_as_it_was(mode):
    """Else a Ray that another test starts would refuse all calls."""
    assert os.environ.get("RAY_AUTH_MODE") == mode


@pytest.mark.parametrize("earlier", [None, 0o644, 0o600])
def test_the_token_of_a_ray_that_starts_here_is_its_users_alone(home, earlier):
    """An earlier Ray made the file readable for everybody. What stands in it stays."""
    token = home / ".ray" / "auth_token"
    if earlier is not None:
        token.parent.mkdir()
        token.write_text("x" * 64)
        token.chmod(earlier)
    cluster._keep_token_private()
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64
    assert earlier is None or token.read_text() == "x" * 64


@pytest.mark.parametrize(
    ("address", "who"), [(None, "Ray to start on this machine"), ("10.0.0.1:6379", "the Ray cluster at 10.0.0.1:6379")]
)
def test_a_cluster_that_takes_long_is_named(monkeypatch, address, who):
    said = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_check_answers", lambda _: None)
    monkeypatch.setattr(cluster, "_local_options", dict)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with notices.shown(said.append):
        monkeypatch.setattr("ray.init", lambda **_: None)
        cluster.connect(address)
        assert said == []
        monkeypatch.setattr(notices, "NOTICE_S", 0.05)
        monkeypatch.setattr("ray.init", lambda **_: until(lambda: said, what="a word"))
        cluster.connect(address)
    assert said == [f"waiting for {who}: for 30 s so far."]


def test_who_asks_ray_after_the_end_starts_no_other_one(home, monkeypatch):
    """A thread that watched a pool did, in a crowded moment. The second Ray had a folder below TMPDIR that nobody removed."""
    started = []
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: started.append("a Ray"))
    cluster.connect("local")
    with contextlib.suppress(RayError):  # where tests before have a Ray, it answers
        ray.wait([ray.ObjectRef(b"x" * 28)], timeout=0)
    assert started == ["a Ray"]
