"""Every end is told: whatever ends a command with a Ray of its own, one line says what and how to go on, and nothing stays.

The ends follow each other on one run, so each also shows that the same command goes on after the end before it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import chaos_run
import psutil
import pytest
from chaos_ground import MARK, ROOT, marked, title
from waiting import until

from pipeline.store.directory import Store

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
SETS = tuple(name for name in (*chaos_run.SMALL, "rounds=40", "evaluation.problems=0") if "gpus" not in name)
SETS = tuple(name for name in SETS if ".resources." not in name and name != "evaluation.problems=8")
AGAIN = "The same command goes on where this one stopped: "
QUICK = ("watch.WORD_S=3", "watch.GIVE_UP_S=9")


@dataclass
class Command:
    """A distill command with a Ray of its own, and all that it starts."""

    uri: str
    tmp: Path
    mark: str
    process: subprocess.Popen[str]

    def said(self, within: float = 60) -> tuple[int, str, float]:
        """(exit code, all output, seconds until the end)."""
        begun = time.monotonic()
        text, _ = self.process.communicate(timeout=within)
        return self.process.returncode, text, time.monotonic() - begun

    def part(self, name: str) -> psutil.Process:
        """A process of the command's Ray, by the path of its program."""
        return next(p for p in marked(self.mark) if f"/{name} " in title(p))

    def worker(self) -> psutil.Process:
        """The process in which the verb works."""
        return next(p for p in marked(self.mark) if p.ppid() == self.process.pid and "driver.py" in title(p))

    def send(self, number: int) -> None:
        """Send a signal to the process that a person sees."""
        self.process.send_signal(number)

    def left(self) -> list[str]:
        """Processes, files and requests that the command has left behind."""
        processes = [f"{p.pid} {title(p)}" for p in marked(self.mark)]
        files = [str(path) for path in self.tmp.rglob("*") if not path.is_dir() and "ray_current_cluster" not in path.name]
        folders = [str(path) for path in self.tmp.glob("egrsd-*/run-*")] + [str(path) for path in self.tmp.rglob("session_2*")]
        run = Path(self.uri)
        requests = [str(path) for path in (run / "lease.json", run / "train" / "stop", run / "control") if path.exists()]
        return processes + files + folders + requests + [str(path) for path in run.glob(".tmp/*")]


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return str(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def start(uri):
    """Starts the command on the run, and waits until it has worked for a while."""
    tmp, started = Path(tempfile.mkdtemp(prefix="ends")), []

    def begin(*sets: str, work: int = 6, stdout: int = subprocess.PIPE) -> Command:
        mark, before = uuid4().hex, chaos_run.work_done(uri)
        environment = os.environ | {MARK: mark, "TMPDIR": str(tmp), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "tests/chaos/driver.py", uri, "local", "0.1", "0.1", *SETS, *sets]
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        command = Command(uri, tmp, mark, process)
        started.append(command)
        until(lambda: chaos_run.work_done(uri) >= before + work or process.poll() is not None, 300, "work is done")
        assert process.poll() is None, process.communicate()[0]
        return command

    yield begin
    for command in started:
        command.process.kill()
        for process in marked(command.mark):
            process.kill()
    shutil.rmtree(tmp, ignore_errors=True)


def assert_told(command: Command, code: int, *lines: str, within: float = 60) -> float:
    """The end is told in one of `lines` with the command that goes on and the log, and nothing is left. Returns its seconds."""
    ended, said, seconds = command.said(within)
    errors = [text for text in said.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1, said
    assert any(line in errors[0] for line in lines)
    assert AGAIN + "driver.py" in errors[0]
    assert shlex.quote(command.uri) in errors[0]
    assert f"log: {command.uri}/logs/" in said
    assert "Traceback" not in said
    assert ended == code
    assert command.left() == []
    print(f"{errors[0][:80]}: {seconds:.1f} s")
    return seconds


@pytest.mark.usefixtures("signals_are_heard")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_ends_the_command_in_order(start, name, code):
    command = start()
    command.send(getattr(signal, name))
    assert_told(command, code, f"Interrupted ({name})", within=90)


@pytest.mark.usefixtures("signals_are_heard")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_while_ray_starts_ends_the_command_in_order(start, name, code):
    """Ray's folder stayed: the command learns of it when Ray has started. And Ray catches what a signal raises in its start: the
    command went on for the minute that an orderly end may take.
    """
    command = start(work=0)
    until(lambda: list(command.tmp.rglob("session_2*")), 60, "Ray starts", every=0.01)
    command.send(getattr(signal, name))
    assert assert_told(command, code, f"Interrupted ({name})", within=90) < 40


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_a_part_of_ray_that_is_killed_is_named(start, part):
    command = start()
    killed = command.part(part)
    killed.kill()
    assert_told(command, 1, f"lost the cluster: {part} of the Ray on this machine (process {killed.pid}) was ended by SIGKILL")


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_a_part_of_ray_that_is_stopped_is_waited_for_and_then_named(start, part):
    command = start(*QUICK)
    stopped = command.part(part)
    stopped.suspend()
    assert_told(command, 1, f"lost the cluster: {part} of the Ray on this machine (process {stopped.pid}) is stopped, for ")
    log = max(Path(command.uri).glob("logs/*"), key=lambda path: path.stat().st_mtime).read_text()
    assert f"waiting for the cluster: {part} of the Ray" in log


@pytest.mark.usefixtures("signals_are_heard")
def test_a_part_of_ray_that_is_stopped_for_a_moment_ends_nothing(start):
    command = start("watch.WORD_S=1", "watch.GIVE_UP_S=60")
    stopped, before = command.part("gcs_server"), chaos_run.work_done(command.uri)
    stopped.suspend()
    log = max(Path(command.uri).glob("logs/*"), key=lambda path: path.stat().st_mtime)
    until(lambda: "waiting for the cluster" in log.read_text(), 60, "a word")
    stopped.resume()
    until(lambda: "the cluster answers again" in log.read_text(), 60, "another word")
    until(lambda: chaos_run.work_done(command.uri) > before, 60, "the run goes on")
    command.send(signal.SIGINT)
    assert_told(command, 130, "Interrupted (SIGINT)", within=90)


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
@pytest.mark.usefixtures("signals_are_heard")
def test_ctrl_c_ends_a_command_whose_ray_is_stopped(start, part):
    command = start()
    command.part(part).suspend()
    command.send(signal.SIGINT)
    # whether the end gets by without the part that stands still depends on what the command was doing
    assert_told(command, 130, "is stopped, for ", "Interrupted (SIGINT)")


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
@pytest.mark.usefixtures("signals_are_heard")
def test_a_second_ctrl_c_ends_a_command_at_once(start, part):
    command = start()
    command.part(part).suspend()
    command.send(signal.SIGINT)
    time.sleep(0.5)
    command.send(signal.SIGINT)
    assert assert_told(command, 130, "Interrupted (SIGINT)") < 15


def test_two_commands_at_once_keep_the_words_of_ray_off_their_screens(tmp_path):
    """Tracebacks of Ray and "Found multiple active Ray instances" broke into the progress bars."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    command = [sys.executable, "tests/chaos/driver.py"]
    commands = [
        subprocess.Popen(
            [*command, str(tmp_path / name), "local", "0.1", "0.1", *SETS, "rounds=2"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("one", "other")
    ]
    noise = re.compile(r"Traceback|active Ray|raylet|gcs_server|pid=|WARNING|ERROR|\.py:\d+")
    try:
        for started in commands:
            said, _ = started.communicate(timeout=400)
            assert started.returncode == 0, said
            assert noise.findall(said) == []
            assert "starting Ray on this machine" in said
            assert "2 training rounds of recipe demo" in said
    finally:
        for started in commands:
            started.kill()


def test_a_command_that_is_killed_is_told_by_its_keeper(start):
    command = start()
    command.worker().kill()
    assert_told(command, 137, "the command was ended by SIGKILL")


def test_output_that_nobody_reads_ends_the_command(start):
    command = start()
    command.process.stdout.close()
    assert command.process.wait(120) == 141
    assert command.left() == []


def test_a_run_that_is_moved_ends_the_command_and_is_not_made_anew(start, uri):
    command = start()
    moved = Path(f"{uri}-moved")
    Path(uri).rename(moved)
    code, said, _ = command.said()
    assert code == 1
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {uri}: the run's folder has gone")
    assert AGAIN in line
    assert not Path(uri).exists()
    moved.rename(uri)
    (Path(uri) / "lease.json").unlink()  # these moved with the folder; the next command would take them over
    shutil.rmtree(Path(uri) / ".tmp")
    assert command.left() == []


def test_after_all_that_the_run_is_whole(uri):
    store = Store(uri)
    assert store.latest_policy() >= 1
    chaos_run.check_counted(store, store.latest_policy())
