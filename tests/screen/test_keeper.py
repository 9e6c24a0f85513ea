"""The keeper tells what its child cannot, frees what it held, and ends what it has started. No Ray is needed for that."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from waiting import until

from jobs.screen import keeper
from pipeline.live import lease
from pipeline.store.directory import Store

ROOT = Path(__file__).parents[2]
BEGIN = "import os, signal, subprocess, sys, time\nfrom jobs.screen import keeper\nkeeper.keep()\n"
AGAIN = "The same command goes on where this one stopped: -c RUN"


@pytest.fixture
def kept():
    """Starts a program whose code works for a keeper, with an argument, and reads its first line."""
    started = []

    def start(code, argument="RUN", wait=False, begin=BEGIN):
        command = [sys.executable, "-c", begin + code, argument]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        started.append(process)
        return process, process.stdout.readline().strip() if wait else ""

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    ("code", "ended", "line"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("keeper.tell(told=1); sys.exit(1)", 1, ""),
        ("os._exit(1)", 1, ""),
        (
            "keeper.tell(joins='local'); os._exit(1)",
            1,
            "error: lost the cluster: Ray ended the command, as it does when a part ",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "error: the command was ended by SIGKILL"),
        ("os.abort()", 134, "error: the command was ended by SIGABRT"),
        ("keeper.tell(lost='why', code=1); time.sleep(600)", 1, "error: why"),
    ],
)
def test_an_end_is_told_once_with_its_exit_code(kept, code, ended, line):
    process, _ = kept(code)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == ended
    assert said.startswith(line)
    assert len(said.splitlines()) == (1 if line else 0)
    if line and "why" not in line:
        assert AGAIN in said


def test_threads_that_work_on_do_not_crash_an_interpreter_that_has_told_its_end(kept):
    """Python takes itself down under threads of Arrow, which then abort with pages of text. So it does not take itself down."""
    code = "import atexit\nfrom jobs import options\natexit.register(print, 'taken down')\n"
    code += "def verb(**_):\n    print('error: why')\n    keeper.tell(told=143)\n    sys.exit(143)\noptions.call(verb)"
    process, _ = kept(code)
    assert (process.communicate(timeout=300)[0], process.returncode) == ("error: why\n", 143)
    process, _ = kept(code.replace("143", "0"))
    assert (process.communicate(timeout=300)[0], process.returncode) == ("error: why\ntaken down\n", 0)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.usefixtures("signals_are_heard")
def test_a_second_signal_ends_at_once_what_does_not_hear_the_first(kept, name, code):
    deaf = "for n in keeper.SIGNALS: signal.signal(n, lambda *_: print('heard', flush=True))\nprint('ready', flush=True)\n"
    process, _ = kept(deaf + "while True: time.sleep(0.1)", wait=True)
    process.send_signal(getattr(signal, name))
    assert process.stdout.readline() == "heard\n"
    if name == "SIGHUP":  # a closing terminal may send it twice
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGTERM)
    else:
        process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == code
    assert said.endswith(f"error: Interrupted ({name}). {AGAIN}\n")


@pytest.mark.usefixtures("signals_are_heard")
def test_a_good_end_that_takes_too_long_is_cut_off_and_stays_good(kept):
    code = "keeper.tell(told=0)\nprint('ready', flush=True)\ntime.sleep(600)"
    process, _ = kept("signal.signal(signal.SIGTERM, lambda *_: None)\n" + code, wait=True)
    process.terminate()
    process.send_signal(signal.SIGINT)
    process.wait(300)
    assert process.returncode == 0  # it had told a good end


def test_what_a_command_has_started_ends_with_it_also_an_orphan(kept):
    orphan = "subprocess.Popen(['sleep', '300'], start_new_session=True).pid"
    middle = f"import subprocess; print({orphan}, flush=True)"
    process, pid = kept(f"subprocess.run([sys.executable, '-c', {middle!r}])\ntime.sleep(0.5)\nos._exit(1)", wait=True)
    process.communicate(timeout=300)
    assert not psutil.pid_exists(int(pid))


def test_a_killed_keeper_takes_its_child_along(kept):
    process, pid = kept("print(os.getpid(), flush=True)\ntime.sleep(600)", wait=True)
    process.kill()
    ended = until(lambda: not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE)
    assert ended
    assert process.wait(300) == -signal.SIGKILL


def test_the_lease_log_and_temporary_folder_of_a_child_that_dies_are_taken_care_of(kept, tmp_path):
    store, log, folder = Store(str(tmp_path / "run")), tmp_path / "run.log", tmp_path / "egrsd-x"
    folder.mkdir()
    code = f"""
keeper.tell(holds={store.uri!r}); keeper.tell(log={str(log)!r}, at='run/logs/x.log'); keeper.tell(folder={str(folder)!r})
from pipeline.live import lease
from pipeline.store.directory import Store
with lease.held(Store({store.uri!r}), pid=keeper.main_pid()):
    Store({store.uri!r}).request_stop()
    print('held', flush=True)
    time.sleep(600)
"""
    process, _ = kept(code, wait=True)
    assert store.read_json(lease.LEASE)["pid"] == process.pid  # the process that a person would stop
    psutil.Process(process.pid).children()[0].kill()
    said = process.communicate(timeout=300)[0]
    assert "log: run/logs/x.log" in said
    assert "exit code 137. error: the command was ended by SIGKILL" in log.read_text()
    assert store.read_json(lease.LEASE) is None
    assert not store.stop_requested()
    assert not folder.exists()


def test_folders_go_though_a_store_does_not_answer(kept, tmp_path):
    """A lease that could not be given back in time once kept a part of Ray's folder."""
    pipe, folder = tmp_path / "lease.json", tmp_path / "egrsd-x"
    os.mkfifo(pipe)  # whoever opens it waits for ever
    folder.mkdir()
    code = f"keeper.tell(holds={str(tmp_path)!r}); keeper.tell(folder={str(folder)!r})\nos.abort()"
    process, _ = kept(code, begin=BEGIN.replace("keeper.keep()", "keeper.FREE_S = 1\nkeeper.keep()"))
    assert "SIGABRT" in process.communicate(timeout=300)[0]
    assert not folder.exists()


def test_the_folder_of_a_ray_that_was_still_starting_goes(kept, tmp_path):
    """Ray tells nobody of its folder before it has started. Its name ends with the process id of the child."""
    code = f"""
os.makedirs(f"{tmp_path}/session_2026-11-29_19-00-00_000001_{{os.getpid()}}/logs")
keeper.tell(ray={str(tmp_path)!r})
os.abort()
"""
    (tmp_path / "session_2026-11-29_19-00-00_000001_1").mkdir()
    process, _ = kept(code)
    assert "SIGABRT" in process.communicate(timeout=300)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["session_2026-11-29_19-00-00_000001_1"]


def test_the_folder_that_python_made_for_a_child_that_dies_goes_too(kept):
    """A lost gcs_server left `pymp-*/listener-*` in TMPDIR: the verifier's processes have their socket there."""
    code = """
from multiprocessing import util
from jobs.screen.terminal import session
with session(debug=False):
    print(util.get_temp_dir(), flush=True)
    time.sleep(600)
"""
    process, folder = kept(code, wait=True)
    assert Path(folder).is_dir()
    psutil.Process(process.pid).children()[0].kill()
    assert "error: the command was ended by SIGKILL" in process.communicate(timeout=300)[0]
    assert not Path(folder).exists()


def test_nohup_is_respected(kept):
    command = [sys.executable, "-c", BEGIN + "print('ready', flush=True)\ntime.sleep(1)\nprint('done')"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=300)[0] == "done\n"
    assert process.returncode == 0


def test_without_a_keeper_nothing_is_told():
    assert not keeper.is_kept()
    assert keeper.main_pid() == os.getpid()
    keeper.tell(told=1)
