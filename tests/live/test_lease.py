"""Two drivers on one run: the second is refused and told who holds it; a dead holder loses it; clocks do not matter."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest
from waiting import race, until

from pipeline.errors import StoreError, UserError
from pipeline.live import lease
from pipeline.recipes import demo
from pipeline.store.directory import Store
from pipeline.store.files import RAY_FOLDER

HOLD = "import sys, time; from pipeline.live import lease; from pipeline.store.directory import Store\n"
HOLD += "lease.BEAT_S = 0.2\nwith lease.held(Store(sys.argv[1])): print('held', flush=True); time.sleep(600)"


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "run"))


@pytest.fixture
def other_driver(store):
    """Another process that holds the run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, store.uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "held"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_lease_ends_with_its_block_also_after_an_error(store):
    with contextlib.suppress(RuntimeError), lease.held(store):
        assert store.read_json(lease.LEASE)["pid"] == os.getpid()
        store.request_stop()  # a trainer that does not end in time leaves it, and the folder of Ray Train
        store.write(f"{RAY_FOLDER}/controller.json", b"")
        raise RuntimeError
    assert store.read_json(lease.LEASE) is None
    assert not store.stop_requested()
    assert not store.names(RAY_FOLDER)
    with lease.held(store):
        pass


def test_a_signal_while_the_lease_is_taken_leaves_none(store, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    freed = []
    monkeypatch.setattr(lease.time, "sleep", interrupted)
    with contextlib.suppress(KeyboardInterrupt), lease.held(store, on_free=lambda: freed.append(store.names(""))):
        raise AssertionError
    assert [name for names in freed for name in names if name != ".tmp"] == []
    assert len(freed) == 1


def test_a_signal_that_cuts_the_end_short_does_not_count_the_lease_as_given_back(store, monkeypatch):
    """Then the keeper, which was not told that it is free, gives it back."""

    def interrupted(_):
        raise KeyboardInterrupt

    freed = []
    with contextlib.suppress(KeyboardInterrupt), lease.held(store, on_free=lambda: freed.append(True)):
        monkeypatch.setattr(store, "delete", interrupted)
    monkeypatch.undo()
    assert (freed, lease.read_lease(store) is None) == ([], False)
    lease.free(store, os.getpid())
    assert lease.read_lease(store) is None


WRITE = "import os, signal, sys; from pipeline.store.directory import Store\n"
WRITE += "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nStore(sys.argv[1]).write('rounds/0000/plan.json', b'{}')"


def test_what_a_killed_writer_had_begun_is_swept_by_whoever_takes_the_run(store):
    subprocess.run([sys.executable, "-c", WRITE, store.uri], check=False)
    assert len(store.names(".tmp")) == 1
    with lease.held(store):
        assert store.names(".tmp") == []
        subprocess.run([sys.executable, "-c", WRITE, store.uri], check=False)  # as a stage's worker that dies under this driver
    assert store.names(".tmp") == []
    assert store.names("") == [".tmp", "rounds"]
    assert store.names("rounds/0000") == []


def test_a_second_driver_is_refused_and_told_who_holds_the_run(store, other_driver):
    with pytest.raises(UserError, match=f"process {other_driver.pid} on .* is working on this run"), lease.held(store):
        pass
    assert store.read_json(lease.LEASE)["pid"] == other_driver.pid


def test_a_killed_driver_on_this_machine_is_taken_over_at_once(store, other_driver):
    other_driver.send_signal(signal.SIGKILL)
    other_driver.wait()
    with lease.held(store, ttl_s=3600) as mine:  # who waited for a sign of life would find no end
        mine.check()


def test_a_silent_holder_elsewhere_loses_it_after_the_ttl_whatever_its_clock(store):
    store.write_json(lease.LEASE, {"token": "x", "holder": "process 1 on far", "host": "far", "pid": 1, "beats": 7})
    with lease.held(store, ttl_s=0.5):
        assert store.read_json(lease.LEASE)["pid"] == os.getpid()


def test_a_holder_elsewhere_that_stirs_keeps_it(store):
    far = {"token": "x", "holder": "process 1 on far", "host": "far", "pid": 1}
    store.write_json(lease.LEASE, far | {"beats": 7})
    over = threading.Event()

    def stir():
        beats = 7
        while not over.wait(0.3):
            store.write_json(lease.LEASE, far | {"beats": (beats := beats + 1)})

    stirring = threading.Thread(target=stir)
    stirring.start()
    try:
        with pytest.raises(UserError, match="process 1 on far"), lease.held(store, ttl_s=300):
            pass
    finally:
        over.set()
        stirring.join()


def test_of_many_that_start_together_one_holds(store):
    assert race(store, 6) == (1, 5)


def take_until_noticed(store, mine):
    """Another driver takes the run; it writes again, since a beat under way may have come after its first write."""

    def noticed():
        store.write_json(lease.LEASE, {"token": "y", "holder": "process 2 on far", "host": "far", "pid": 2, "beats": 0})
        return mine.stolen_by

    until(noticed, what="the holder notices", every=0.2)


def test_a_beat_that_cannot_be_written_is_not_the_last(store, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    failures = []

    def failing(*arguments):
        failures.append(arguments)
        raise StoreError("cannot write (No space left on device)")

    with lease.held(store) as mine:
        with monkeypatch.context() as full:
            full.setattr(lease, "_write", failing)
            while not failures:
                time.sleep(0.05)
        take_until_noticed(store, mine)
        assert mine.stolen_by == "process 2 on far"
    assert store.read_json(lease.LEASE)["token"] == "y"


def test_a_driver_that_stood_still_sees_at_once_that_its_lease_was_taken(store):
    with lease.held(store) as mine:
        assert not mine.is_lost()
        store.write_json(lease.LEASE, {"token": "y", "holder": "process 2 on far", "host": "far", "pid": 2, "beats": 0})
        assert mine.is_lost()  # before a heartbeat of its own


def test_a_driver_whose_lease_was_taken_notices(store, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    told = []
    with lease.held(store, on_gone=told.append) as mine:
        take_until_noticed(store, mine)
        with pytest.raises(StoreError, match="process 2 on far has taken over"):
            mine.check()
        until(lambda: told, 10, "who works for the driver is told")  # else it would work on for up to a round
    assert [str(error) for error in told] == [
        f"{store.uri}: process 2 on far has taken over this run. Let it finish, or stop it and resume"
    ]
    assert store.read_json(lease.LEASE)["token"] == "y"


def test_a_folder_that_has_gone_ends_its_holder_and_is_not_made_anew(store, monkeypatch, tmp_path):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    told = []
    with lease.held(store, on_gone=told.append):
        store.save_run(demo(), {})
        (tmp_path / "run").rename(tmp_path / "moved")
        until(lambda: told, what="the holder is told")
        for writer in (store, pickle.loads(pickle.dumps(store))):  # the driver, and a worker of a stage
            with pytest.raises(StoreError, match="the run's folder has gone"):
                writer.write("rounds/0000/plan.json", b"{}")
            with pytest.raises(StoreError, match="the run's folder has gone"):
                writer.scratch()
    assert "the run's folder has gone" in told[0].what
    assert not (tmp_path / "run").exists()


def test_the_lease_of_a_process_that_could_not_give_it_back_is_freed_and_no_other(store):
    with lease.held(store):
        lease.free(store, os.getpid() + 1)
        assert store.read_json(lease.LEASE) is not None
        store.request_stop()
        store.write(f"{RAY_FOLDER}/controller.json", b"")
        lease.free(store, os.getpid())
        assert store.read_json(lease.LEASE) is None
        assert not store.stop_requested()
        assert not store.names(RAY_FOLDER)
