"""The server of a live report, without a browser: what it answers, to whom, and when it has something new."""

from __future__ import annotations

import http.client
import json
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import pytest
from other_user import other_user, seen_by_all
from report_runs import add_round, byte_tokenizer, new_run

from jobs import report, serving
from pipeline.errors import UserError
from pipeline.recipes import demo
from pipeline.store.directory import Store


@pytest.fixture
def growing(tmp_path):
    """A run without a round, and a function that adds one."""
    byte_tokenizer(tmp_path / "model")
    store, run = new_run(tmp_path / "run", f"model.path={tmp_path / 'model'}", "rounds=2")

    def grow(number):
        responses = [np.full(5, 65 + number) for _ in range(4)]
        add_round(store, run, number, responses, ["x"] * 4, [f"problem {number}"])

    return serving.Watched([(store, run)], None), grow, store


def asked(address, name=""):
    """The body of a part of the page."""
    with urlopen(f"{address}{name}", timeout=300) as answer:
        return answer.read()


def test_the_document_follows_the_run(growing):
    watched, grow, store = growing
    with serving.serve(watched, 0) as served:
        first = json.loads(asked(served.address, "document"))
        assert "nothing to report" in first["document"]["runs"][0]["waiting"]
        grow(0)
        assert watched.look()
        assert not watched.look()  # nothing is new
        found = json.loads(asked(served.address, "document"))
        state = json.loads(asked(served.address, "state"))
        assert state["version"] == found["version"] > first["version"]
        assert len(found["document"]["runs"][0]["rounds"]) == 1
        assert list(found["blocks"]) == ["block-0-0"]
        assert b"connect-src 'self'" in asked(served.address)
        store.write(store.entry("rounds/0000", "score", "0000").path, b"damaged")
        store.write_metrics("round", 0, [{"round": 0, "seconds_round": 4.0}])
        store.write("metrics/0001-round.jsonl", b"")
        assert not watched.look()  # what was read stays, and the reason is told
        assert "sha256 differs" in json.loads(asked(served.address, "state"))["said"]


def test_a_report_that_cannot_be_written_is_refused_before_rounds_are_read(monkeypatch, capfd):
    monkeypatch.setattr(report, "collect_all", lambda *_: pytest.fail("rounds are read"))
    with seen_by_all() as folder:
        Store(f"{folder}/run").save_run(demo(), {})
        with other_user(), pytest.raises(SystemExit) as ended:
            report.report_run([f"{folder}/run"], None, None, False)
        assert ended.value.code == 2
        assert f"{folder}/run/: cannot write (Permission denied). Get the right" in " ".join(capfd.readouterr().err.split())


def test_nobody_else_is_answered(growing):
    watched, _, _ = growing
    with serving.serve(watched, 0) as served:
        place = urlsplit(served.address)
        assert place.hostname == "127.0.0.1"
        for path, headers in (("/", {}), ("/wrong/", {}), (place.path, {"Host": "evil.example"}), (f"{place.path}other", {})):
            with pytest.raises(HTTPError, match="404"):
                urlopen(Request(f"http://{place.netloc}{path}", headers=headers), timeout=300)
        line = http.client.HTTPConnection(place.hostname, place.port, timeout=300)
        line.putrequest("POST", place.path)
        line.endheaders()
        assert line.getresponse().status == 501
        with pytest.raises(UserError, match=f"port {place.port} cannot be used"), serving.serve(watched, place.port):
            pass
