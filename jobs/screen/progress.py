"""Progress bars for terminals and logs, and the screen that a run's driver writes to."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.spinner import Spinner

from jobs.screen.terminal import Session
from pipeline.driver import Advance

log = logging.getLogger("egrsd")
EVERY_S = 10.0  # a log gets a line per bar at most this often
# What Python code prints, such as Ray's words of its workers, goes to the log as all else does. rich would show it above bars.
TO_THE_LOG: dict[str, Any] = {"redirect_stdout": False, "redirect_stderr": False}
SILENT_S = 60.0  # after so long without a line a log gets the last bar again, with its time


class Bars(Progress):
    """rich's progress bars, which here also write to logs: a bar that moved is printed as a new line, and no other.

    rich itself writes nothing to a file or pipe until the end. This class prints a bar at most every `EVERY_S` seconds, and
    when it is full. The log of a Ray job thus stays short, and has no control characters. A bar that has not moved for `SILENT_S`
    seconds is printed again: a round of a large model takes long, and its reader should see that time goes on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.live.transient = not self.console.is_terminal  # otherwise rich writes every bar once more at the end of a log
        self._due: dict[TaskID, float] = {}
        self._shown: dict[TaskID, tuple[float, Any]] = {}  # steps and note of the last line of each bar
        self._last_line, self._end = time.monotonic(), threading.Event()

    def start(self) -> None:
        """Begin to show bars."""
        super().start()
        if not self.console.is_terminal:
            threading.Thread(target=self._remind, name="egrsd-bars", daemon=True).start()

    def stop(self) -> None:
        """End showing bars."""
        self._end.set()
        super().stop()

    def _remind(self) -> None:
        while not self._end.wait(min(1.0, SILENT_S / 4)):
            going = [task for task in self.tasks if not task.finished]
            if going and time.monotonic() >= self._last_line + SILENT_S:
                self._print(going[-1])

    def _print(self, task: Task) -> None:
        self._last_line = time.monotonic()
        self.console.print(self.make_tasks_table([task]))

    def update(self, task_id: TaskID, *args: Any, **kwargs: Any) -> None:
        """Change a bar as rich does, and write it to a log."""
        super().update(task_id, *args, **kwargs)
        self._write(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Move a bar as rich does, and write it to a log."""
        super().advance(task_id, advance)
        self._write(task_id)

    def _write(self, task_id: TaskID) -> None:
        if self.console.is_terminal:
            return
        moved = next(task for task in self.tasks if task.id == task_id)
        now = moved.completed, moved.fields.get("note")
        if now != self._shown.get(task_id) and (moved.finished or time.monotonic() >= self._due.get(task_id, 0.0)):
            self._due[task_id], self._shown[task_id] = time.monotonic() + EVERY_S, now
            self._print(moved)


@dataclass(frozen=True)
class TerminalScreen:
    """The driver's screen (pipeline.driver.Screen) on a terminal or in a log."""

    out: Session
    bars: Bars

    def say(self, text: str) -> None:
        """Show one line."""
        self.out.say(text)

    def bar(self, title: str, total: int, done: int = 0) -> Advance:
        """Show a bar of `total` steps, `done` of them done. The returned function moves it by one step."""
        task = self.bars.add_task(title, total=total, completed=done, note="")

        count = itertools.count(done + 1)

        def step(note: str = "") -> None:
            """Move the bar by one step, with a note beside it. The log gets a line too."""
            self.bars.update(task, advance=1, note=note)
            log.info("%s", f"{title} {next(count)}/{total} {note}".rstrip())

        return step


@contextlib.contextmanager
def open_screen(out: Session) -> Iterator[TerminalScreen]:
    """A screen with bars on the verb's terminal, for the length of a block."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Bars(*columns, TimeElapsedColumn(), console=out.console, refresh_per_second=4, **TO_THE_LOG) as bars:
        yield TerminalScreen(out, bars)


def spinner(out: Session, what: str) -> Live:
    """A sign of life with a few words, for the length of a block on a terminal."""
    text = Spinner("dots", text=escape(what), style="status.spinner")
    return Live(text, console=out.console, refresh_per_second=12.5, transient=True, **TO_THE_LOG)


@contextlib.contextmanager
def phase(out: Session, what: str) -> Iterator[None]:
    """Name a part of the start while it goes on, and tell its seconds at its end. A terminal shows a spinner meanwhile."""
    begun = time.monotonic()
    if out.console.is_terminal:
        with spinner(out, f"{what} ..."):
            yield
    else:
        out.say(f"{what} ...")
        yield
    out.say(f"{what}: {time.monotonic() - begun:.1f} s")
