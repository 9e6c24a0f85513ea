"""The watch over a cluster: the death of a part is heard, silence is told and then ended, and an answer in time ends nothing."""

import errno
import subprocess
import threading

import psutil
import pytest
from ray import exceptions
from waiting import until

from actors import watch
from actors.watch import Overheard, Watch, explain


@pytest.fixture
def part():
    """A process that stands for a part of Ray."""
    process = subprocess.Popen(["sleep", "300"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def watched(monkeypatch):
    """Starts a watch that is impatient. Returns what it says, and how it ends."""
    monkeypatch.setattr(watch, "LOOK_S", 0.05)
    monkeypatch.setattr(
        watch, "ASK_S", 0.05
    )  # so that a look that a full machine holds up counts as one, and no word is left out
    monkeypatch.setattr(watch, "WORD_S", 0.2)
    monkeypatch.setattr(watch, "HURRY_S", 0.5)
    stop, threads = threading.Event(), []

    def start(parts, ask=lambda: None, hurried=False, give_up_s=1.0):
        monkeypatch.setattr(watch, "GIVE_UP_S", give_up_s)
        said, ends = [], []
        thread = threading.Thread(target=Watch(parts, ask, said.append, ends.append, lambda: hurried).run, args=(stop,))
        threads.append(thread)
        thread.start()
        return said, ends

    yield start
    stop.set()
    for thread in threads:
        thread.join()


RAYLET = (
    "\x1b[33m(raylet)\x1b[0m [2026-11-29 06:39:43,831 E 30092 30092] (raylet) node_manager.cc:3517: 7 Workers (tasks / actors) "
    "killed due to memory pressure (OOM), 0 Workers crashed due to other reasons at node (ID: 14871fe2, IP: 127.0.0.1) over the "
    "last time period. To see more information about the Workers killed on this node, use `ray logs raylet.out -ip 127.0.0.1`\n"
)


def test_processes_that_ray_ended_for_memory_are_told_once_a_node(tmp_path):
    """The line is Ray's, of a run of 2026-11-29, after which nothing was said for ten minutes."""
    log = tmp_path / "run.log"
    log.write_text(RAYLET.replace("7 W", "3 W"))  # of an earlier command
    heard = Overheard(log)
    assert heard.word() is None
    with open(log, "a") as file:
        file.write("a word\n" + RAYLET[:40])
        file.flush()
        assert heard.word() is None
        file.write(RAYLET[40:] + RAYLET.replace("127.0.0.1", "10.0.0.2"))
        file.flush()
        text = heard.word()
        assert text.startswith("memory ran out, and Ray ended processes: 7 on node 127.0.0.1, 7 on node 10.0.0.2. ")
        assert "engines.rollout.max" in text
        file.write(RAYLET)
        file.flush()
        assert heard.word() is None


def test_a_part_that_dies_ends_the_command_with_its_name_and_signal(watched, part):
    said, ends = watched({"raylet": part})
    part.kill()
    until(lambda: ends, what="an end")
    expected = f"lost the cluster: raylet of the Ray on this machine (process {part.pid}) was ended by SIGKILL"
    assert [end.what for end in ends] == [expected]
    assert said == []


def test_a_part_that_is_stopped_gets_a_word_and_then_ends_the_command(watched, part):
    said, ends = watched({"gcs_server": part})
    psutil.Process(part.pid).suspend()
    until(lambda: ends, what="an end")
    assert f"gcs_server of the Ray on this machine (process {part.pid}) is stopped, for " in ends[0].what
    assert [line.split(":")[0] for line in said] == ["waiting for the cluster"]


def test_silence_that_ends_in_time_ends_nothing(watched):
    answers = [None, "no", "no", "no", "no", "no", "no"]
    said, ends = watched({}, lambda: answers.pop() if answers else None, give_up_s=1000)
    until(lambda: len(said) == 2, what="two words")
    assert said[1] == "the cluster answers again."
    assert ends == []


def test_who_waits_for_the_end_waits_less(watched):
    _, ends = watched({}, lambda: "the head does not answer", hurried=True, give_up_s=1000)
    until(lambda: ends, what="an end")
    assert ends[0].what.startswith("lost the cluster: the head does not answer, for ")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (exceptions.OutOfMemoryError("killed"), "memory ran out, and Ray ended a process of the run (killed)"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (exceptions.NodeDiedError("gone"), "lost a part of the cluster (NodeDiedError: "),
        (exceptions.RaySystemError(ValueError("x")), "lost a part of the cluster (RaySystemError: "),
        (exceptions.WorkerCrashedError(), "lost a part of the cluster (WorkerCrashedError: "),
    ],
)
def test_errors_of_ray_that_are_no_bug_are_explained(error, told):
    assert explain(error).what.startswith(told)


def test_an_actor_whose_constructor_raises_is_no_lost_part():
    error = exceptions.RayActorError("0", "It died in its creation task\nValueError: no such model", actor_init_failed=True)
    assert explain(error).what == "an actor could not start (ValueError: no such model)"


def test_a_part_that_ends_while_it_is_looked_at_is_not_stopped(monkeypatch, part):
    def gone(_):
        raise psutil.NoSuchProcess(part.pid)

    monkeypatch.setattr(psutil.Process, "status", gone)
    monkeypatch.setattr(watch, "own_parts", lambda: {"raylet": part})
    monkeypatch.setattr(watch.ray, "shutdown", lambda: None)
    watch.leave()
    assert part.poll() is None


def test_a_bug_is_not_explained():
    assert explain(ValueError("x")) is None


def test_a_full_folder_explains_a_failure_of_ray(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(watch, "_FULL_BYTES", 1 << 60)
    told = explain(exceptions.RaySystemError(ValueError("x")))
    assert (told.where, told.what) == (str(tmp_path), "no space left")
