"""Bars in a log: lines while it goes on, few of them, no control characters; on a terminal they are rich's."""

import io
import sys
import time

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from waiting import until

from jobs.screen import progress
from jobs.screen.progress import open_screen, phase, spinner
from jobs.screen.terminal import session
from pipeline.store.directory import Store

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())


@pytest.fixture
def written():
    """What a file gets: a console that is no terminal."""
    return io.StringIO()


def lines(written):
    return [line for line in written.getvalue().splitlines() if line.strip()]


def test_a_bar_in_a_log_is_seen_before_the_end_and_not_at_every_step(written, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Bars(*COLUMNS, console=Console(file=written, width=80)) as bars:
        task = bars.add_task("rounds", total=100)
        for _ in range(60):
            bars.advance(task)
        seen = lines(written)
    assert seen
    assert seen[0].endswith("1/100")
    assert len(seen) < 20
    assert "\x1b" not in written.getvalue()
    assert "\r" not in written.getvalue()
    assert lines(written) == seen


def test_a_full_bar_is_always_written(written):
    with progress.Bars(*COLUMNS, console=Console(file=written, width=80)) as bars:
        task = bars.add_task("rounds", total=3)
        for done in (1, 2, 3):
            bars.update(task, completed=done)
    assert [line.split()[-1] for line in lines(written)] == ["1/3", "3/3"]


def test_a_bar_that_shows_what_it_showed_before_is_not_written_again(written):
    with progress.Bars(*COLUMNS, console=Console(file=written, width=80)) as bars:
        task = bars.add_task("rounds", total=1, note="")
        bars.advance(task)
        bars.update(task)
        bars.update(task, note="")
        bars.update(task, note="accuracy 0.50")
    assert [line.split()[-1] for line in lines(written)] == ["1/1", "1/1"]  # the second one has another note


def test_on_a_terminal_nothing_is_written_beside_the_live_bars(written):
    console = Console(file=written, width=80, force_terminal=True)
    with progress.Bars(*COLUMNS, console=console, auto_refresh=False) as bars:
        bars.advance(bars.add_task("rounds", total=3))
        assert "1/3" not in written.getvalue()


def test_a_phase_is_named_before_and_after_with_its_seconds(capfd):
    with session(debug=False) as out, phase(out, "starting Ray [here]"):
        out.say("meanwhile")
    first, middle, last = capfd.readouterr().out.splitlines()
    assert (first, middle) == ("starting Ray [here] ...", "meanwhile")
    assert last.startswith("starting Ray [here]: ")
    assert last.endswith(" s")


def test_a_bar_that_does_not_move_is_seen_again_in_a_log(written, monkeypatch):
    """A newcomer's log had no line for nine minutes of one round."""
    monkeypatch.setattr(progress, "SILENT_S", 0.1)
    with progress.Bars(*COLUMNS, console=Console(file=written, width=80)) as bars:
        task = bars.add_task("rounds", total=2)
        bars.advance(task)
        until(lambda: len(lines(written)) >= 3, what="the bar again")
        bars.advance(task)
        seen = len(lines(written))
        time.sleep(0.5)
        assert len(lines(written)) == seen, "a full bar is over"
    assert {line.split()[-1] for line in lines(written)} == {"1/2", "2/2"}


def test_the_log_of_a_run_tells_each_step_of_its_bars(tmp_path):
    """The log of a finished run had four lines."""
    store = Store(str(tmp_path / "run"))
    with session(debug=False) as out:
        out.log_to(store)
        with progress.open_screen(out) as screen:
            step = screen.bar("round 0", 3, done=1)
            step()
            step("accuracy 0.50")
    [name] = store.names("logs")
    log = (store.read_bytes(f"logs/{name}") or b"").decode()
    assert [line.partition("egrsd ")[2] for line in log.splitlines() if "round 0" in line] == [
        "round 0 2/3",
        "round 0 3/3 accuracy 0.50",
    ]


@pytest.mark.parametrize("shown", ["bars", "spinner", "phase"])
def test_what_python_code_prints_beside_bars_is_not_on_the_terminal(written, capfd, shown):
    """Ray's driver prints the words of its workers with `print`, which rich would put above the bars."""
    with session(debug=False) as out:
        out.console = Console(file=written, width=80, force_terminal=True)
        with {"bars": open_screen(out), "spinner": spinner(out, "working"), "phase": phase(out, "working")}[shown]:
            print("(EngineActor pid=1) noise", file=sys.stderr)
            print("(EngineActor pid=1) noise")
    assert "noise" not in written.getvalue()
    assert "".join(capfd.readouterr()).count("noise") == 2
