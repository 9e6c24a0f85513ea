"""A store that takes long to answer is named to the person who waits; one that answers is not."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from waiting import until

from jobs import evaluate, export, scale, status, verify
from jobs.train import train_committed
from pipeline import notices
from pipeline.store import files
from pipeline.store.directory import Store
from pipeline.store.files import replace_local


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
