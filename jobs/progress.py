"""Progress bars for terminals and for logs."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import Progress, TaskID

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
