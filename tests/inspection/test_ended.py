"""The reason why the last command ended is read from its log, and told by `ls` and `status` with the command that goes on."""

import os

import pytest

from jobs import status
from jobs.screen.terminal import session
from pipeline.errors import ResourceError
from pipeline.inspection.ended import last_error
from pipeline.inspection.learning import listed
from pipeline.live import lease
from pipeline.recipes import demo
from pipeline.store.directory import Store


@pytest.fixture
def store(tmp_path):
    """A run without a round whose last command has failed."""
    store = Store(str(tmp_path / "run"))
    store.save_run(demo(), {})

    def fail():
        with session(debug=False) as out:
            out.log_to(store)
            raise ResourceError("4 GPUs are missing", "engines.rollout", "Lower it")

    with pytest.raises(SystemExit):
        fail()
    return store


def test_the_reason_and_the_command_that_goes_on_are_told(store, capfd):
    assert last_error(store) == "engines.rollout: 4 GPUs are missing. Lower it"
    assert [one.state for one in listed(store.uri)] == ["new; ended: engines.rollout: 4 GPUs are missing. Lower it"]
    capfd.readouterr()
    status.show(store.uri, False)
    said = capfd.readouterr().out
    assert "the last command ended: engines.rollout: 4 GPUs are missing. Lower it\n" in said
    assert f"`egrsd distill --run {store.uri}` goes on.\n" in said


def test_a_later_command_that_ended_well_has_no_error(store):
    store.write(f"logs/99991231-235959-{os.getpid()}.log", b"2026-11-29 INFO egrsd all is well\n")
    assert last_error(store) is None


def test_the_last_word_is_found_before_what_other_processes_write(store):
    [name] = store.names("logs")
    store.write(f"logs/{name}", (store.read_bytes(f"logs/{name}") or b"") + b"raylet: \xff ends\n" * 100)
    assert last_error(store) == "engines.rollout: 4 GPUs are missing. Lower it"


def test_while_a_command_works_nothing_has_ended(store):
    with lease.held(store):
        assert last_error(store) is None
    assert last_error(store) is not None


def test_a_run_without_a_log_has_no_error(tmp_path):
    assert last_error(Store(str(tmp_path))) is None
