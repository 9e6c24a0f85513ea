"""The server that starts the children is stopped. Nothing waits for it without end, and every question has an outcome."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from multiprocessing import active_children, forkserver

import psutil
import pytest
from waiting import until

from pipeline.grader.children import LATE, NEVER, OVERRAN, Children, Outcome, allow, done, note


def double(pipe) -> None:
    """The loop of a child that doubles numbers."""
    with suppress(EOFError):
        while True:
            done(pipe, 2 * pipe.recv())


def spin(pipe) -> None:
    """The loop of a child that may use as many processor seconds as it is told, and uses more. It answers 0."""
    with suppress(EOFError):
        while True:
            if allowed := pipe.recv():
                allow(allowed)
            while allowed:
                pass
            done(pipe, allowed)


def pause(pipe) -> None:
    """The loop of a child that may use one processor second, and stops itself before it answers. It answers how it ended."""
    with suppress(EOFError):
        while True:
            pipe.recv()
            allow(1.0)
            os.kill(os.getpid(), signal.SIGSTOP)
            allow(0)
            done(pipe, "went on")


def server() -> int:
    return forkserver._forkserver._forkserver_pid


def stop_server() -> int:
    with suppress(ProcessLookupError, TypeError):
        os.kill(server(), signal.SIGSTOP)
    return server()


@pytest.fixture
def children():
    with closing(Children(double, 1, stall_s=2.0)) as children:
        assert children.ask([1]) == [Outcome(2)]
        yield children
        with suppress(ProcessLookupError):
            os.kill(server(), signal.SIGCONT)


def test_a_key_that_interrupts_the_command_is_not_for_its_children(children, capfd):
    """Ctrl-C in a terminal goes to all processes of the command. A child showed its traceback there."""
    [child] = children._idle
    os.kill(child.process.pid, signal.SIGINT)
    assert children.ask([2]) == [Outcome(4)]
    assert children._idle == [child]
    assert capfd.readouterr().err == ""


def asked(children: Children, questions: list[int]) -> list[Outcome]:
    """The outcomes, asked for in a thread: a test that waits without end would tell nothing."""
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.extend(children.ask(questions)), daemon=True)
    thread.start()
    until(lambda: not thread.is_alive(), what="outcomes while the server is stopped")
    return found


def test_a_stopped_server_is_replaced_when_an_idle_child_was_killed(children):
    stopped = stop_server()
    idle = children._idle[0].handle
    idle.kill()
    until(lambda: idle.status() == psutil.STATUS_ZOMBIE, what="the end of the child")
    assert asked(children, [2, 3]) == [Outcome(4), Outcome(6)]
    assert server() != stopped


def test_a_question_whose_end_no_server_tells_is_asked_again(children):
    child = children._idle[0].process
    os.kill(child.pid, signal.SIGSTOP)
    stop_server()
    killer = threading.Timer(1.0, os.kill, (child.pid, signal.SIGKILL))
    killer.start()
    assert asked(children, [2]) == [Outcome(4)]
    killer.join()


def test_an_overrun_is_told_after_the_server_of_the_child_died():
    with closing(Children(spin, 1)) as spinning:
        assert spinning.ask([0.0]) == [Outcome(0.0)]
        os.kill(server(), signal.SIGKILL)
        assert asked(spinning, [0.2]) == [Outcome(ended=OVERRAN)]


def test_a_child_that_dies_after_it_was_given_a_question_costs_no_answer(children):
    child = children._idle[0].process
    os.kill(child.pid, signal.SIGSTOP)  # so that the question is sent to a child that never reads it
    killer = threading.Timer(0.5, os.kill, (child.pid, signal.SIGKILL))
    killer.start()
    assert asked(children, [2]) == [Outcome(4)]
    killer.join()


def test_servers_that_are_stopped_again_and_again_end_every_question(children, monkeypatch):
    run_server = forkserver._forkserver.ensure_running

    def stopped_at_once():
        run_server()
        stop_server()

    children._kill(children._idle.pop())
    monkeypatch.setattr(forkserver._forkserver, "ensure_running", stopped_at_once)
    assert asked(children, [2, 3]) == [Outcome(ended=NEVER)] * 2
    assert not active_children()


def wait_after_a_note(pipe) -> None:
    """The loop of a child that sends a note and then answers, or waits without using the processor."""
    with suppress(EOFError):
        while True:
            waits = pipe.recv()
            note(pipe, "begun")
            if waits:
                threading.Event().wait()
            done(pipe, "answer")


def test_a_question_that_waits_is_ended_by_the_clock_and_asked_once():
    with closing(Children(wait_after_a_note, 1, deadline_s=3.0)) as waiting:
        late, in_time = asked(waiting, [True, False])
        assert (late.ended, late.notes) == (LATE, ("begun",))
        assert in_time == Outcome("answer", ("begun",))


def test_abandoned_children_end_without_a_new_thread(monkeypatch):
    """At the end of a process Python 3.12 starts no thread."""
    children = Children(double, 1)
    assert children.ask([1]) == [Outcome(2)]
    handle = children._idle[0].handle

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    children.abandon()
    monkeypatch.undo()
    until(lambda: not handle.is_running() or handle.status() == psutil.STATUS_ZOMBIE, what="the end of the child")
    children.close()


def wake_up(woken: list[int], over: threading.Event) -> None:
    """Let each child that has stopped itself go on after two seconds, until it is `over`."""
    while not over.wait(0.05):
        for child in active_children():
            with suppress(psutil.Error):
                if psutil.Process(child.pid).status() == psutil.STATUS_STOPPED:
                    time.sleep(2)
                    woken.append(child.pid)
                    os.kill(child.pid, signal.SIGCONT)


def test_the_deadline_counts_processor_seconds_and_no_time_in_which_a_question_is_stopped():
    woken: list[int] = []
    over = threading.Event()
    waker = threading.Thread(target=wake_up, args=(woken, over))
    waker.start()
    with closing(Children(pause, 1)) as paused:
        outcomes = asked(paused, [1])
    over.set()
    waker.join()
    assert outcomes == [Outcome("went on")]
    assert len(woken) == 1  # a child that is ended has its question asked again, by another


def test_a_script_without_a_guard_is_not_run_again_by_a_child(tmp_path):
    (tmp_path / "script.py").write_text(
        "from pipeline.grader.verifier import Grader\n"
        "print('begins', flush=True)\n"
        "grader = Grader(processes=1)\n"
        r"print(*(row.verdict for row in grader.grade([r'\boxed{2/4}'], ['0.5'], ['stop'])))" + "\n"
        "grader.close()\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert done.stdout.split() == ["begins", "correct"], done.stderr
