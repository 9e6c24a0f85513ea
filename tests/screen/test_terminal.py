"""The terminal of a verb: signals, and an output that is gone."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.screen.terminal import session
from pipeline import errors
from pipeline.errors import StoreError
from pipeline.recipes import demo
from pipeline.store.directory import Store

ROOT = Path(__file__).parents[2]


def egrsd(shell):
    """A line of bash with $EGRSD as the command. Its exit code is that of the first command of a pipe."""
    environment = os.environ | {"EGRSD": f"{sys.executable} -m jobs"}
    line = ["bash", "-c", shell + "; exit ${PIPESTATUS[0]}"]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture
def run(tmp_path):
    store = Store(str(tmp_path / "run"))
    store.save_run(demo(), {})
    return store


@pytest.mark.parametrize("command", ["--help", "recipes", "status --run RUN"])
def test_a_full_output_is_one_line(command, run):
    done = egrsd(f"$EGRSD {command.replace('RUN', run.uri)} >/dev/full")
    assert done.returncode == 1
    assert done.stderr == "error: cannot write standard output (No space left on device)\n"


def test_a_closed_output_is_one_line(run):
    done = egrsd(f"$EGRSD status --run {run.uri} >&-")
    assert (done.returncode, done.stderr) == (1, "error: cannot write standard output (Bad file descriptor)\n")


def test_a_mistake_is_told_on_standard_error_when_the_output_is_full(run, tmp_path):
    done = egrsd(f"$EGRSD export --run {run.uri} --out {tmp_path}/out >/dev/full")
    assert done.returncode == 2
    assert "no round has all its traces yet" in done.stderr


@pytest.mark.parametrize("command", ["recipes --show demo", "status --run RUN"])
def test_an_output_that_nobody_reads_ends_the_verb_without_a_word(command, run):
    """As `| head -1` does. The reader has gone before the verb writes."""
    done = egrsd(f"$EGRSD {command.replace('RUN', run.uri)} | true")
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_output_is_utf_8_whatever_the_locale(locale, run):
    """`status` draws sparklines. With LC_ALL=C there was an internal error (UnicodeEncodeError)."""
    run.save_run(demo().model_copy(update={"name": "größer ▁█"}), {})
    done = egrsd(f"{' '.join(f'{name}={value}' for name, value in locale.items())} $EGRSD status {run.uri}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("größer ▁█: 0 of 16 rounds trained")


def test_whatever_ray_or_vllm_write_goes_to_the_log_and_not_to_the_screen(run, capfd, monkeypatch):
    """Two commands at once had Ray's tracebacks and "Found multiple active Ray instances" in their bars."""
    ray = logging.getLogger("ray")  # a Ray of another test may have made it write to the stream of that test
    monkeypatch.setattr(ray, "handlers", [])
    monkeypatch.setattr(ray, "propagate", True)
    with session(debug=False) as out:
        out.say("before the log")
        out.log_to(run)
        out.say("our word")
        os.write(2, b"of C++\n")
        subprocess.run(["sh", "-c", "echo of a worker; echo of its errors >&2"], check=True)
        ray.warning("Found multiple active Ray instances")
    assert capfd.readouterr() == ("before the log\nour word\n", "")
    [name] = run.names("logs")
    log = (run.read_bytes(f"logs/{name}") or b"").decode()
    noise = ("of C++", "of a worker", "of its errors", "Found multiple active Ray instances")
    assert [text for text in ("before the log", "our word", *noise) if text not in log] == []


@pytest.mark.usefixtures("signals_are_heard")
def test_a_signal_whose_error_a_library_has_caught_is_heeded_later(capfd):
    def verb():
        with session(debug=False) as out:
            out.heed()
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            out.heed()

    with pytest.raises(SystemExit) as ended:
        verb()
    assert (ended.value.code, capfd.readouterr().err) == (143, "error: Interrupted (SIGTERM)\n")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.usefixtures("signals_are_heard")
def test_a_signal_ends_a_verb_with_one_line_and_128_plus_its_number(name, code, capfd):
    before = signal.getsignal(getattr(signal, name))

    def verb():
        with session(debug=False):
            os.kill(os.getpid(), getattr(signal, name))
            signal.pause()

    with pytest.raises(SystemExit) as ended:
        verb()
    assert ended.value.code == code
    assert capfd.readouterr().err == f"error: Interrupted ({name})\n"
    assert signal.getsignal(getattr(signal, name)) is before


@pytest.mark.parametrize("instead", [TypeError("Got unexpected argument type"), StoreError("is damaged", "x", "Delete it")])
@pytest.mark.usefixtures("signals_are_heard")
def test_a_signal_that_a_library_takes_for_an_error_of_its_own_is_still_told(capfd, instead):
    """Arrow raises the TypeError when a signal comes at its door, and a reader may then take the file for damaged."""

    def verb():
        with session(debug=False):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            except BaseException:
                raise instead from None

    with pytest.raises(SystemExit) as ended:
        verb()
    assert (ended.value.code, capfd.readouterr().err) == (143, "error: Interrupted (SIGTERM)\n")


@pytest.mark.usefixtures("signals_are_heard")
def test_a_signal_keeps_its_name_when_a_library_raises_its_own_interrupt_instead(capfd):
    def verb():
        with session(debug=False):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            except KeyboardInterrupt:
                raise KeyboardInterrupt from None  # as Ray does while it waits for an answer

    with pytest.raises(SystemExit) as ended:
        verb()
    assert ended.value.code == 143
    assert capfd.readouterr().err == "error: Interrupted (SIGTERM)\n"


def test_an_end_that_a_thread_has_found_is_the_verbs_error(capfd):
    def verb():
        with session(debug=False) as out:
            out.end(errors.ClusterError("lost the cluster: why"))
            signal.pause()

    with pytest.raises(SystemExit) as ended:
        verb()
    assert ended.value.code == 1
    assert capfd.readouterr().err == "error: lost the cluster: why\n"


def test_the_folder_of_a_held_run_that_has_gone_explains_any_error(tmp_path, capfd, run):
    from jobs.opened import hold_run

    moved = tmp_path / "moved"

    def verb():
        with session(debug=False) as out:
            hold_run(out, run.uri)
            Path(run.uri).rename(moved)
            raise errors.StoreError("policy 1 is not published", run.uri, "Policies here: 0 to 0")

    with pytest.raises(SystemExit) as ended:
        verb()
    assert ended.value.code == 1
    assert capfd.readouterr().err.startswith(f"error: {run.uri}: the run's folder has gone: it was moved, or its disk has left.")
    assert not Path(run.uri).exists()
