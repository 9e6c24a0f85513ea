"""Programs that nobody trusts, in the locked-down process: what they try, and that it fails. Nothing here is a fake."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from waiting import until

from pipeline.grader import sandbox
from pipeline.grader.python_tests import python_tests
from pipeline.grader.sandbox import Limits, Program, SandboxError

MAIN = "exec(compile(open('answer.py').read(), 'answer.py', 'exec'), {'__name__': '__main__'})"
ALL, NO_ROOT = {}, {"namespaces": False}  # all locks; those that a container without user namespaces still has


def tried(answer: str, stdin: str = "", **limits):
    """How one program ended, in a process with these limits."""
    [ended] = sandbox.run([Program(MAIN, answer, stdin)], Limits(**{"time_s": 5.0, "still_s": 300.0, **limits})).runs
    return ended


def attempt(*statements: str) -> str:
    """A program that prints the type of the error of each statement, or `done`."""
    lines = ["import os, sys, socket, subprocess, signal, ctypes"]
    for statement in statements:
        lines += [
            "try:",
            f"    {statement}",
            "    print('done')",
            "except BaseException as error:",
            "    print(type(error).__name__)",
        ]
    return "\n".join(lines)


@pytest.mark.parametrize("locks", [ALL, NO_ROOT], ids=["namespaces", "no namespaces"])
def test_a_program_has_no_network_no_files_no_processes_and_no_environment(locks, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "a-secret-word")
    secret = tmp_path / "secret.txt"
    secret.write_text("a-secret-word")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = attempt(
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)",
            "socket.socket(socket.AF_UNIX)",
            f"print(open({str(secret)!r}).read())",
            f"open({str(tmp_path / 'new')!r}, 'w')",
            f"os.listdir({str(Path.home())!r})",
            "open(os.__file__, 'a')",
            "open('/proc/1/environ')",
            "os.fork()",
            "subprocess.run(['/bin/sh', '-c', 'echo hello'])",
            f"os.kill({os.getpid()}, 0)",
            "os.kill(os.getppid(), signal.SIGKILL)",
            "os.killpg(0, signal.SIGTERM)",
        )
        ended = tried(
            program + "\nprint(sorted(os.environ))\nopen('mine', 'w').write('x' * 100)\nprint(len(open('mine').read()))", **locks
        )
    lines = ended.stdout.splitlines()
    assert len(lines) == 14
    assert set(lines[:12]) <= {"PermissionError", "FileNotFoundError", "OSError", "BlockingIOError", "ProcessLookupError"}
    assert "a-secret-word" not in ended.stdout
    assert "TOKEN" not in lines[-2]
    assert lines[-1] == "100"
    assert ended.ended == "exit"
    assert not (tmp_path / "new").exists()


def test_locks_are_reported_and_without_one_nothing_runs():
    whole = sandbox.run([Program(MAIN, "print(1)")], Limits())
    assert whole.missing == []
    assert [one.stdout for one in whole.runs] == ["1\n"]
    bare = sandbox.run([Program(MAIN, "print(1)")], Limits(namespaces=False, landlock=False, seccomp=False))
    assert (bare.missing, bare.runs) == (["files", "network", "processes"], [])
    open_ = sandbox.run([Program(MAIN, "print(1)")], Limits(namespaces=False, landlock=False, seccomp=False, required=False))
    assert [one.stdout for one in open_.runs] == ["1\n"]
    assert open_.by == ()


@pytest.mark.parametrize("locks", [ALL, NO_ROOT], ids=["namespaces", "no namespaces"])
@pytest.mark.parametrize(
    ("answer", "ended", "printed"),
    [
        ("import os\nwhile True:\n    os.fork()\n", "failed", ""),
        ("while True:\n    pass\n", "time", ""),
        ("while True:\n    print('x' * 1000)\n", "output", None),
        ("x = bytearray(10**10)\n", "failed", ""),
        ("open('big', 'wb').write(bytes(40 << 20))\n", "failed", ""),
        ("import sys\nsys.exit(3)\n", "failed", ""),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n", "failed", ""),
        ("import os\nos.close(1)\nos.close(2)\nos.close(0)\n", "exit", ""),
        ("print(input()[::-1])", "exit", "cba\n"),
    ],
)  # fmt: skip
def test_limits_end_a_program_and_nothing_of_it_is_left(answer, ended, printed, locks, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    found = tried(answer, "abc\n", time_s=0.5 if ended == "time" else 5.0, **locks)
    assert found.ended == ended
    assert len(found.stdout) <= 64 * 1024
    assert printed is None or found.stdout == printed
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_sleeps_is_ended():
    assert tried("import time\ntime.sleep(1000)\n", still_s=1.0).ended == "still"


def stop_programs(most, ended):
    """Stop the first programs that appear below this process, at most so many. Returns their process ids."""
    stopped = []
    while len(stopped) < most and not ended.is_set():
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if process.pid not in stopped and {"-P", "-c"} <= set(process.cmdline()):
                    process.suspend()
                    stopped.append(process.pid)
        time.sleep(0.005)
    return stopped


@pytest.mark.parametrize(("stops", "value"), [(1, 1.0), (2, 0.0)])
def test_a_program_that_gets_no_processor_is_run_once_more(stops, value, monkeypatch):
    """It was a 0 at once, so a machine that stood still for ten seconds made right answers wrong."""
    monkeypatch.setattr("pipeline.grader.python_tests.Limits", partial(Limits, still_s=4.0))
    answer, ended = "import time\ntime.sleep(2)\ndef add(a, b):\n    return a + b\n", threading.Event()
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(stop_programs, stops, ended)
        [found] = python_tests([answer], {}, tests=[["assert add(1, 2) == 3"]])
        ended.set()
    assert len(stopped.result()) == stops
    assert found.value == value
    assert found.said.endswith("passed 1 of 1 tests." if value else "the program took too long by the clock, twice.")


def test_a_program_does_not_outlive_who_watches_it():
    """Where no namespaces are, a driver that was killed left a program of the model asleep for ever."""
    asked: list[BaseException] = []

    def ask() -> None:
        try:
            tried("import time\ntime.sleep(10**6)\n", **NO_ROOT)
        except SandboxError as error:
            asked.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()

    def chain() -> list[psutil.Process]:
        """The process that took the plan, the one that watches, and the program."""
        for first in psutil.Process().children():
            with suppress(psutil.Error, ValueError):
                [second] = first.children()
                [third] = second.children()
                if "answer.py" in " ".join(third.cmdline()):
                    return [first, second, third]
        return []

    first, _, program = until(chain, what="the program of the model")
    first.kill()
    thread.join(300)
    until(lambda: not program.is_running() or program.status() == psutil.STATUS_ZOMBIE, what="the end of the program")
    assert asked


def test_threads_fill_their_memory_and_not_the_machine():
    start = "threading.Thread(target=time.sleep, args=(100,), daemon=True).start()"
    program = f"import threading, time\nfor _ in range(10**6):\n    {start}\n"
    assert tried(program, time_s=1.0, still_s=10.0, memory_mb=256).ended in ("failed", "time", "still")


def test_the_same_program_gives_the_same_answer():
    program = "print(hash('a'), list({'a', 'b', 'c', 'd'}))"
    first = tried(program)
    assert first.ended == "exit"
    assert first.stdout
    assert first.stdout == tried(program).stdout


@pytest.mark.parametrize(
    "answer",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "import builtins\nbuiltins.AssertionError = ZeroDivisionError\ndef add(a, b):\n    return 0",
        "while True: pass",
        "def add(a, b):\n    import os\n    os._exit(0)",
        "print('told'); import os\nos.write(4, b'told')",
        "",
    ],
)
def test_an_answer_that_ends_early_or_hangs_is_a_0(answer):
    [found] = python_tests([answer], {"time_s": 0.5}, tests=[["assert add(1, 2) == 3"]])
    assert found.value == 0.0
