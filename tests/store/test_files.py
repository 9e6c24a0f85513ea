"""A store that takes long to answer is named to the person who waits; one that answers is not."""

import os
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from other_user import other_user, seen_by_all
from pyarrow import fs
from waiting import until

from jobs import evaluate, export, scale, status, verify
from jobs.train import train_committed
from pipeline import notices
from pipeline.errors import StoreError, UserError
from pipeline.store import files
from pipeline.store.directory import Store
from pipeline.store.files import check_place, replace_local


class Silent(BaseHTTPRequestHandler):
    """A server that accepts every connection, and says "not found" only once it may answer."""

    def answer(self):
        self.server.answers.wait(600)
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def silent(monkeypatch):
    """An object store that does not answer. `set()` lets it answer."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    server.daemon_threads, server.answers = True, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield server.answers
    server.answers.set()
    server.shutdown()


def test_a_store_that_answers_is_not_told_of(silent):
    said = []
    silent.set()
    with notices.shown(said.append):
        assert Store("s3://runs/x").read_bytes("run.json") is None
        assert Store("s3://runs/x").size("run.json") is None
    assert said == []


@pytest.mark.parametrize("request_", [("read_bytes", "run.json"), ("size", "run.json"), ("delete", "lease.json")])
def test_a_store_that_does_not_answer_is_named_once(silent, monkeypatch, request_):
    said, (method, path) = [], request_
    monkeypatch.setattr(notices, "NOTICE_S", 0.3)
    with notices.shown(said.append), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(getattr(Store("s3://runs/x"), method), path)
        until(lambda: said, what="a word")
        silent.set()
        assert asked.result(120) is None
    assert len(said) == 1
    assert said[0].startswith("waiting for the object store: to ")
    assert "s3://runs/x" in said[0]


def lost(*_):
    raise OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject: curlCode: 7, Couldn't connect; Details: http://x")


ACTS = (("read_bytes", "a"), ("size", "a"), ("names", ""), ("write", "a", b"x"), ("delete", "a"))


class Network:
    """A file system whose requests fail as often as `lost` says."""

    def __init__(self, root):
        self.filesystem, self.lost, self.asked = fs.SubTreeFileSystem(str(root), fs.LocalFileSystem()), 0, 0

    def __getattr__(self, name):
        self.asked += 1
        self.lost -= 1
        return lost if self.lost >= 0 else getattr(self.filesystem, name)


@pytest.fixture
def network(tmp_path, monkeypatch):
    """(store, its network, seconds of the pauses) of an object store."""
    store, seen, pauses = Store("s3://runs/x"), Network(tmp_path), []
    store.__dict__["opened"] = seen, ""
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    return store, seen, pauses


@pytest.mark.parametrize("act", ACTS, ids=[name for name, *_ in ACTS])
def test_a_lost_network_is_a_mistake_of_the_user_only_before_the_store_has_answered(network, act):
    store, seen, pauses = network
    seen.lost = 1
    with pytest.raises(UserError, match="Check AWS_ENDPOINT_URL and the network"):
        getattr(store, act[0])(*act[1:])
    assert (seen.asked, pauses) == (1, [])
    getattr(store, act[0])(*act[1:])
    seen.lost, seen.asked = 100, 0
    for one in (store, pickle.loads(pickle.dumps(store))):
        one.__dict__["opened"] = seen, ""
        with pytest.raises(StoreError, match=r"NETWORK_CONNECTION.*The network was lost") as raised:
            getattr(one, act[0])(*act[1:])
        assert "http://x" not in str(raised.value)
    assert pauses == [*files.PAUSES_S, *files.PAUSES_S]


def test_a_network_that_comes_back_is_waited_for(network):
    store, seen, pauses = network
    store.write("a", b"old")
    said = []
    with notices.shown(said.append):
        for act in ACTS:
            seen.lost = 2
            getattr(store, act[0])(*act[1:])
    assert pauses == [1.0, 2.0] * len(ACTS)
    assert len(said) == 1
    assert "NETWORK_CONNECTION" in said[0]
    assert "tried again in 1 s" in said[0]


def test_another_failure_is_told_at_once(network, monkeypatch):
    store, _, pauses = network
    store.write("a", b"x")
    monkeypatch.setattr(Network, "__getattr__", lambda *_: (_ for _ in ()).throw(OSError("AWS Error SLOW_DOWN")))
    with pytest.raises(StoreError, match="SLOW_DOWN"):
        store.read_bytes("a")
    assert pauses == []


VERBS = {
    "status": lambda uri: status.show(uri, False),
    "verify": lambda uri: verify.verify_run(uri, False),
    "scale": lambda uri: scale.scale(uri, [], False),
    "export": lambda uri: export.export_run(uri, f"{uri}-out", False),
    "train": lambda uri: train_committed(uri, None, [], None, False),
    "evaluate": lambda uri: evaluate.evaluate(uri, evaluate.Options("last", [], None, []), None, False),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_the_word_before_it_has_shown_anything(silent, monkeypatch, capfd, verb):
    told = notices.tell

    def tell(kind, text):
        told(kind, text)
        silent.set()

    monkeypatch.setattr(notices, "NOTICE_S", 0.3)
    monkeypatch.setattr(notices, "tell", tell)
    with pytest.raises(SystemExit) as ended:
        VERBS[verb]("s3://runs/none")
    lines = "".join(capfd.readouterr()).splitlines()
    assert ended.value.code == 2
    assert lines[0].startswith("waiting for the object store: to ")
    assert lines[1].startswith("error: s3://runs/none: no run here")
    assert len(lines) == 2


def test_a_place_that_takes_no_file_is_known_before_it_is_written_to(tmp_path, monkeypatch):
    """`compare --csv` found it after hours."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for free in (tmp_path / "a.csv", Path("~/a.csv"), Path(os.devnull)):
        check_place(free)
    with pytest.raises(OSError, match="there is no folder"):
        check_place(Path("~/none/a.csv"))
    with pytest.raises(OSError, match="Is a directory"):
        check_place(tmp_path)
    with seen_by_all() as folder, other_user(), pytest.raises(OSError, match="Permission denied"):
        check_place(folder / "a.csv")


@pytest.mark.usefixtures("signals_are_heard")
def test_a_file_that_a_person_named_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    real, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            replace_local(link, "new")
    assert (real.read_text(), sorted(path.name for path in tmp_path.iterdir())) == ("old", ["link.yaml", "real.yaml"])
    replace_local(link, "new")
    assert (real.read_text(), link.is_symlink(), real.stat().st_mode & 0o777) == ("new", True, 0o640)
    replace_local(Path(os.devnull), "new")
    assert not Path(os.devnull).is_file()
