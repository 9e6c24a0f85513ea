"""Words to the person who waits: whoever has been silent for NOTICE_S seconds is named, once for each kind of silence.

Any thread of a verb's process may call `tell`. The verb's terminal shows the words inside `shown`; elsewhere they are log lines.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

NOTICE_S = 30.0
AGAIN_S = 60.0  # seconds between two texts about one wait

log = logging.getLogger("egrsd.notices")


def tell(kind: str, text: str) -> None:
    """Tell the person at the terminal `text`, unless a text of the same `kind` was told before."""
    log.warning(text, extra={"kind": kind})


class Sparing:
    """Tells what a thread sees at every look, without filling the log. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last = clock, dict[tuple[str, str], tuple[str, float]]()

    def tell(self, kind: str, text: str, about: str = "") -> None:
        """Tell `text`, unless it is the last one of its kind `about` the same thing, or comes within AGAIN_S seconds of it."""
        now = self._clock()
        last, at = self._last.get((kind, about), ("", -AGAIN_S))
        if text != last and now - at >= AGAIN_S:
            self._last[kind, about] = text, now
            tell(kind, text)


@contextlib.contextmanager
def late(kind: str, text: str) -> Iterator[None]:
    """Tell `text` when a block takes longer than NOTICE_S seconds."""
    timer = threading.Timer(NOTICE_S, tell, (kind, text))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def shown(say: Callable[[str], None]) -> Iterator[None]:
    """Show the words with `say` for the length of a block. A second text of one kind goes to the log alone."""
    handler = _Shown(say)
    before, log.propagate = log.propagate, False  # `say` logs what it shows
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before


class _Shown(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say, self._told = say, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a text of a new kind, and log any other."""
        kind = getattr(record, "kind", record.getMessage())
        if kind in self._told:
            logging.getLogger("egrsd").info(record.getMessage())
        else:
            self._told.add(kind)
            self._say(record.getMessage())
