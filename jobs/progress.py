"""Progress bars for terminals and for logs, and the screen of a run's driver."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from jobs.terminal import Session
from pipeline.driver import Step

EVERY_S = 10.0


class Bars(Progress):
    """rich's bars, which also show in a log: where nothing can be drawn over, a bar that moved is a line of its own.

    rich itself writes nothing to a file or pipe until all is over. Here a bar is written at most every `EVERY_S` seconds, and
    when it is full; so a Ray job's log stays short, and free of control characters.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.live.transient = not self.console.is_terminal  # rich would write every bar once more at the end
        self._due: dict[TaskID, float] = {}

    def update(self, task_id: TaskID, *args: Any, **kwargs: Any) -> None:
        """As rich's."""
        super().update(task_id, *args, **kwargs)
        self._write(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As rich's."""
        super().advance(task_id, advance)
        self._write(task_id)

    def _write(self, task_id: TaskID) -> None:
        if self.console.is_terminal:
            return
        moved = next(task for task in self.tasks if task.id == task_id)
        if moved.finished or time.monotonic() >= self._due.get(task_id, 0.0):
            self._due[task_id] = time.monotonic() + EVERY_S
            self.console.print(self.make_tasks_table([moved]))


@dataclass(frozen=True)
class TerminalScreen:
    """The screen of a driver (pipeline.driver.Screen) on a terminal, or in a log."""

    out: Session
    bars: Bars

    def say(self, text: str) -> None:
        """Show one line."""
        self.out.say(text)

    def bar(self, title: str, total: int, done: int = 0) -> Step:
        """Show a bar of `total` steps of which `done` are done."""
        task = self.bars.add_task(title, total=total, completed=done, note="")

        def step(note: str = "") -> None:
            """Move the bar by one."""
            self.bars.update(task, advance=1, note=note)

        return step


@contextlib.contextmanager
def open_screen(out: Session) -> Iterator[TerminalScreen]:
    """Bars on a verb's terminal for the length of a block."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Bars(*columns, TimeElapsedColumn(), console=out.console, refresh_per_second=4) as bars:
        yield TerminalScreen(out, bars)
