"""Questions to a driver through a run folder, and their answers. A dead holder is named, and nothing is left behind."""

import json
import os
import subprocess
import sys

import pytest

from pipeline.errors import EgrsdError, ResourceError, UserError
from pipeline.live import control
from pipeline.live.lease import LEASE
from pipeline.store import owner
from pipeline.store.directory import Store


def test_without_a_driver_nothing_is_asked(tmp_path):
    store = Store(str(tmp_path))
    with pytest.raises(UserError, match="no command works on this run"):
        control.ask(store, {})
    assert store.names("control") == []


def test_a_question_gets_its_answer_or_its_error(tmp_path):
    store = Store(str(tmp_path))
    store.write_json(LEASE, {"holder": "process 7 on far", "token": "x", "host": "far", "pid": 7, "beats": 0})
    store.write("control/old.ask.json", b"{}")  # of a driver that died

    def answer(question):
        if question["add"] < 0:
            raise ResourceError("too few", "engines.rollout", "Add")
        if question["add"] > 99:
            raise KeyError("sizes")
        return {"sum": question["add"] + 1}

    with control.answering(store, answer):
        assert control.ask(store, {"add": 1}) == {"sum": 2}
        with pytest.raises(ResourceError, match=r"engines\.rollout: too few\. Add"):
            control.ask(store, {"add": -1})
        with pytest.raises(EgrsdError, match=r"the run's driver failed \(KeyError: 'sizes'\)"):
            control.ask(store, {"add": 100})
        assert json.loads(json.dumps(control.ask(store, {"add": 2}))) == {"sum": 3}
    assert store.names("control") == []


def test_a_driver_that_died_here_or_has_no_engines_is_told_apart(tmp_path):
    store = Store(str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid, message in ((ended.pid, "is dead. Run its command again"), (os.getpid(), "does not answer. Engines are up while")):
        store.write_json(LEASE, {"holder": f"process {pid}", "token": "x", "host": owner.host(), "pid": pid, "beats": 0})
        with pytest.raises(UserError, match=message):
            control.ask(store, {}, patience_s=0.3)
    assert store.names("control") == []  # neither question is left
