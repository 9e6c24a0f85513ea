"""Verdicts on honest, wrong and hostile answers. The verifier is the real one, and really hangs and dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import until

from pipeline.config import Grade, Prompts, Run
from pipeline.contract import Reject, Verdict
from pipeline.errors import SettingError
from pipeline.grader.children import Children
from pipeline.grader.verifier import Graded, Grader, Reading, grader_of, reads_unmarked


def settings_of(**grade) -> Run:
    return Run(name="x", grade=Grade(deadline_s=3.0, **grade))


HANGS = r"\boxed{\sum_{n=1}^{\infty} \frac{\sin(n^2)}{n \ln(n+1)}}"
TOO_LARGE = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def grader():
    with closing(Grader(deadline_s=20)) as grader:
        assert verdict(grader, r"\boxed{\frac{1}{3}}", r"\frac{2}{6}") == "correct"  # its children have started
        yield grader


def verdict(grader: Grader, response: str, answer: str, finish: str = "stop") -> str | None:
    return grader.grade([response], [answer], [finish])[0].verdict


def test_verdicts_that_need_no_mathematics_start_no_process(grader):
    before = set(multiprocessing.active_children())
    with closing(Grader(answer_pattern=r"#(-?\d+)$")) as patterned:
        responses = ["7+4=11#11", "7+4=10#10", "7+4=", "7+4=11#11", "7+4=11#1#11"]
        results = patterned.grade(responses, ["11"] * 5, ["stop", "stop", "stop", "length", "stop"])
    assert [r.verdict for r in results] == ["correct", "wrong", "unparsable", "truncated", "correct"]
    with closing(Grader("exact")) as exact:
        assert verdict(exact, r"\boxed{\frac{2}{4}}", "0.5") == "wrong"
    assert set(multiprocessing.active_children()) == before


def test_words_of_the_contract():
    assert {"correct", "wrong", "unparsable", "truncated", "timeout"} == set(Verdict)
    assert {"verifier_timeout", "verifier_error", "missing_answer"} <= set(Reject)


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"\boxed{\frac{2}{4}}", "0.5", "correct"),
        (r"\boxed{x = 5}", "5", "correct"),
        (r"\boxed{(x-1)(x+1)}", "x^2-1", "correct"),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", "correct"),
        (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}", "wrong"),
        (r"\boxed{\pi}", "3.14", "wrong"),
        (r"\boxed{50\%}", "0.5", "correct"),
        ("the sum: 9 #### 72", "He sold 48 + 24 = 72 clips.\n#### 72", "correct"),
        (r"\boxed{silent}", "listen", "wrong"),
        (r"\boxed{Listen}", "listen", "correct"),
        (r"\boxed{\text{no}}", "5/2", "wrong"),
        (r"\boxed{Yes}", "yes", "correct"),
        (r"\boxed{yx}", "xy", "correct"),
        (r"\boxed{??}", "x+1", "unparsable"),
    ],
)
def test_mathematics_decides_what_texts_cannot(grader, response, answer, expected):
    assert verdict(grader, response, answer) == expected


def test_a_reference_that_cannot_be_read_is_not_the_responses_fault(grader):
    [other, same] = grader.grade([r"\boxed{x+2}", r"\boxed{x+\oint}"], [r"x+\oint"] * 2, ["stop"] * 2)
    assert (other.verdict, other.reject) == (None, "unreadable_answer")
    assert "grade.verifier=exact" in other.detail
    assert same == Graded("correct", answer=r"x+\oint")
    assert grader.unreadable(["5", r"x+\oint", r"\frac{1}{2}", "#### 7", r"\text{even}"]) == [1]
    with closing(Grader("exact")) as exact:
        assert exact.unreadable([r"x+\oint"]) == []


def test_a_row_without_reference_is_rejected(grader):
    assert [r.reject for r in grader.grade(["1", "1"], [None, " "], ["stop", "stop"])] == ["missing_answer"] * 2
    with pytest.raises(ValueError, match="zip"):
        grader.grade(["1"], [], [])


def test_an_answer_that_hangs_is_wrong_and_holds_up_no_other_row():
    with closing(Grader(deadline_s=0.4, processes=2)) as hurried:
        responses = [r"\boxed{\frac{1}{2}}", HANGS, r"\boxed{\frac{1}{3}}", HANGS, r"\boxed{\frac{2}{4}}"]
        results = hurried.grade(responses, ["0.5"] * 5, ["stop"] * 5)
    assert [r.verdict for r in results] == ["correct", "wrong", "wrong", "wrong", "correct"]
    assert [r.gave_up for r in results] == [False, True, False, True, False]
    assert {r.reject for r in results} == {None}


def test_a_reference_that_hangs_is_a_timeout_and_not_the_answers_fault():
    slow = "+".join(rf"\frac{{x_{{{i}}}}}{{y^{{{i}}}}}" for i in range(60))
    with closing(Grader(deadline_s=0.02, processes=1)) as hurried:
        [result] = hurried.grade([r"\boxed{\frac{1}{3}}"], [slow], ["stop"])
    assert (result.verdict, result.reject, result.gave_up) == ("timeout", "verifier_timeout", True)
    assert "reference answer alone" in result.detail


def test_a_number_that_nobody_computes_costs_no_deadline(grader):
    assert [verdict(grader, f"\\boxed{{{answer}}}", "5/2") for answer in ("9^{9^{9^{9}}}", "(10^9)!", r"\binom{10^8}{10^7}")] == [
        "wrong"
    ] * 3
    assert not any(r.gave_up for r in grader.grade([TOO_LARGE], ["5/2"], ["stop"]))


def test_time_for_which_a_child_is_stopped_does_not_count():
    known = set(multiprocessing.active_children())
    with closing(Grader(deadline_s=1.0, processes=1)) as patient:
        assert verdict(patient, r"\boxed{\frac{1}{2}}", "0.5") == "correct"
        [child] = wait_for_children(known)
        os.kill(child.pid, signal.SIGSTOP)
        waker = threading.Timer(2.5, os.kill, (child.pid, signal.SIGCONT))
        waker.start()
        assert verdict(patient, r"\boxed{\frac{3}{6}}", "0.5000") == "correct"
        waker.join()
        assert wait_for_children(known) == [child]


def test_a_stopped_child_is_replaced_and_its_row_tried_again():
    known = set(multiprocessing.active_children())
    with closing(Grader(processes=1, reading=Reading(stall_s=3.0))) as watchful:
        assert verdict(watchful, r"\boxed{\frac{1}{2}}", "0.5") == "correct"
        [child] = wait_for_children(known)
        os.kill(child.pid, signal.SIGSTOP)
        [result] = watchful.grade([r"\boxed{\frac{3}{6}}"], ["0.5000"], ["stop"])
        assert result == Graded("correct", answer=r"\frac{3}{6}")
        assert child not in wait_for_children(known)


def test_a_row_whose_every_child_is_stopped_is_a_typed_reject(monkeypatch):
    start = Children._start

    def stopped_at_once(self):
        child = start(self)
        os.kill(child.process.pid, signal.SIGSTOP)
        return child

    monkeypatch.setattr(Children, "_start", stopped_at_once)
    with closing(Grader(processes=1, reading=Reading(stall_s=2.0))) as watchful:
        [result] = watchful.grade([r"\boxed{\frac{3}{6}}"], ["0.5000"], ["stop"])
    assert (result.verdict, result.reject, result.gave_up) == ("timeout", "verifier_timeout", True)
    assert "stood still" in result.detail


def wait_for_children(known: set) -> list:
    return until(lambda: [child for child in multiprocessing.active_children() if child not in known], what="a child")


def test_a_verifier_that_dies_twice_is_an_error_of_its_row_only():
    def kill(times: int) -> None:
        """By psutil alone: a second thread that asks multiprocessing for a child would take its exit code away."""
        killed: set[int] = set()

        def alive() -> psutil.Process | None:
            return next((child.handle for child in patient._children._busy if child.handle.pid not in killed), None)

        for _ in range(times):
            child = until(alive, what="a child")
            until(lambda child=child: child.cpu_times().user > 0.5, what="a child at work")
            killed.add(child.pid)
            child.kill()

    with closing(Grader(deadline_s=60, processes=1)) as patient:
        killer = threading.Thread(target=kill, args=(2,))
        killer.start()
        [result] = patient.grade([HANGS], ["0.5"], ["stop"])
        killer.join()
        assert (result.verdict, result.reject, result.gave_up) == (None, "verifier_error", True)
        assert "exit code -9, twice" in result.detail
        assert verdict(patient, r"\boxed{\frac{2}{4}}", "0.5") == "correct"


def test_a_child_that_dies_idle_costs_no_row():
    known = set(multiprocessing.active_children())
    with closing(Grader(deadline_s=60, processes=1)) as patient:
        assert verdict(patient, r"\boxed{\frac{1}{2}}", "0.5") == "correct"
        os.kill(wait_for_children(known)[0].pid, signal.SIGKILL)
        assert verdict(patient, r"\boxed{\frac{3}{6}}", "0.5") == "correct"


ORPHAN = r"""
import os, threading
from multiprocessing import active_children
from pipeline.grader.verifier import Grader
def main():
    grader = Grader(deadline_s=1, processes=1)
    grader.grade([r"\boxed{\frac12}"], ["0.5"], ["stop"])
    print(*(child.pid for child in active_children()), flush=True)
    threading.Timer(0.5, os._exit, (9,)).start()
    grader.grade([r"\boxed{\sum_{n=1}^{\infty} \frac{\sin(n^2)}{n \ln(n+1)}}"], ["0.5"], ["stop"])
if __name__ == "__main__":
    main()
"""


def test_a_hanging_child_does_not_outlive_its_caller_for_long(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(tmp_path / "orphan.py")]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False, env=environment)
    assert ended.returncode == 9
    [pid] = map(int, ended.stdout.split())
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, what="the end of the child")


def test_it_works_in_a_rays_worker_outside_its_main_thread(ray_local):
    worker = ray_local.remote(num_cpus=1)(Grader).options(max_concurrency=2).remote(deadline_s=0.5, processes=1)
    responses = [r"\boxed{\frac{1}{2}}", HANGS, r"\boxed{\frac{1}{3}}"]
    results = ray_local.get(worker.grade.remote(responses, ["0.5"] * 3, ["stop"] * 3))
    assert [r.verdict for r in results] == ["correct", "wrong", "wrong"]
    assert ray_local.get(worker.grade.remote(responses[:1], ["0.5"], ["stop"]))[0] == Graded("correct", answer=r"\frac{1}{2}")
    ray_local.kill(worker)


def test_the_graders_of_one_process_are_shared():
    assert grader_of(settings_of()) is grader_of(settings_of())


@pytest.mark.parametrize(
    ("grade", "student", "read"),
    [
        ({}, "{problem}", True),
        ({}, "{problem} Put the answer in \\boxed{{}}.", False),
        ({"fallback": "on"}, "{problem} Put the answer in \\boxed{{}}.", True),
        ({"fallback": "off"}, "{problem}", False),
    ],
)
def test_an_unmarked_answer_counts_unless_the_prompt_asks_for_a_box(grade, student, read):
    run = Run(name="x", grade=Grade(**grade), prompts=Prompts(student=student))
    assert reads_unmarked(run) is read
    with closing(Grader(reading=Reading(fallback=read))) as grader:
        assert verdict(grader, "So there are 42", "42") == ("correct" if read else "unparsable")
        assert verdict(grader, "The answer is 42", "42") == "correct"


def test_inequalities_and_intervals_are_the_same_where_the_setting_says_so(grader):
    assert verdict(grader, r"\boxed{x<3}", r"(-\infty,3)") == "correct"
    with closing(Grader(reading=Reading(set_relations=False), processes=1)) as apart:
        assert verdict(apart, r"\boxed{x<3}", r"(-\infty,3)") == "wrong"


@pytest.mark.parametrize(
    "noise", ["{" * 10**6, r"\boxed{" * 10**5, "\\boxed" + " " * 10**6, "1" * 10**6, "1/" * 10**6, "#### " * 10**5, "\0" * 10**6]
)
def test_a_megabyte_of_noise_is_read_in_a_moment(grader, noise):
    started = time.thread_time()
    [result] = grader.grade([noise], ["5/2"], ["stop"])
    assert result.verdict in {"unparsable", "wrong"}
    assert not result.gave_up
    assert time.thread_time() - started < 5


@pytest.mark.parametrize(
    "answer",
    ["{" * 300, "9**9**9**9", "\0x", "\ud800", "(10^9)!", r"\frac{" * 200 + "1" + "}{2}" * 200, "__import__('os').abort()"],
)
def test_hostile_answers_are_never_right_and_never_lethal(answer):
    hostile, honest = grader_of(settings_of()).grade(
        [f"\\boxed{{{answer}}}", r"\boxed{\frac{5}{2}}"], ["5/2", "2.5"], ["stop", "stop"]
    )
    assert hostile.verdict in {"wrong", "unparsable", "timeout", None}
    assert (hostile.verdict in {"timeout", None}) == (hostile.reject is not None)
    assert hostile.reject in {None, "verifier_error"}
    assert honest == Graded("correct", answer=r"\frac{5}{2}")


def test_a_catastrophic_pattern_is_a_timeout():
    with closing(Grader("exact", r"(a|aa)+$", 0.5)) as trapped:
        [bad, good] = trapped.grade(["a" * 60 + "b", "aa"], ["a", "a"], ["stop", "stop"])
    assert (bad.verdict, bad.reject) == ("timeout", "verifier_timeout")
    assert good.verdict == "correct"


@pytest.mark.parametrize(("pattern", "message"), [("(", "not a regular expression"), (r"#\d+", "has no group")])
def test_a_pattern_that_cannot_work_is_named(pattern, message):
    with pytest.raises(SettingError, match=rf"grade\.answer_pattern: .*{message}"):
        Grader(answer_pattern=pattern)


def test_many_simple_rows_take_no_time():
    responses = [rf"Some words, \frac{{1}}{{2}} and a box: \boxed{{{i % 50}}}" for i in range(10_000)]
    with closing(Grader()) as quick:
        started = time.thread_time()
        results = quick.grade(responses, ["7"] * 10_000, ["stop"] * 10_000)
        assert time.thread_time() - started < 5
    assert sum(r.verdict == "correct" for r in results) == 200


def test_it_works_outside_the_main_thread(grader):
    seen: list[str | None] = []
    thread = threading.Thread(target=lambda: seen.append(verdict(grader, r"\boxed{\frac{4}{8}}", "0.5")))
    thread.start()
    thread.join()
    assert seen == ["correct"]


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=30))
def test_any_text_gets_a_verdict_or_a_reason(text):
    [result] = grader_of(settings_of()).grade([f"\\boxed{{{text}}}"], ["17"], ["stop"])
    assert result.verdict in set(Verdict) or result.reject in set(Reject)
