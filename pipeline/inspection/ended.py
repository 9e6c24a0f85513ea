"""How the last command on a run ended, when it did not end well: the last word of its log."""

from __future__ import annotations

import contextlib
import re

from pipeline.errors import LAST_WORD
from pipeline.live.lease import is_dead, read_lease
from pipeline.store.directory import Store
from pipeline.store.files import inside

_LAST_WORD = re.compile(re.escape(LAST_WORD).replace("%d", r"\d+").replace("%s", "(.+)"))
_LOG = re.compile(r"\d{8}-\d{6}-\d+\.log")
_TAIL = 1 << 17  # bytes at the end of a log that are read: other processes may write after the last word


def last_error(store: Store) -> str | None:
    """Why the last command that kept a log failed. None when it ended well, when nobody knows, or while a command works."""
    lease = read_lease(store)
    if lease is not None and not is_dead(lease):
        return None
    logs = [match[0] for match in store.named("logs", _LOG)]
    found = _LAST_WORD.findall(_tail(store, f"logs/{max(logs)}")) if logs else []
    return found[-1].strip() if found else None


def _tail(store: Store, path: str) -> str:
    """The end of a file as text. Empty when it cannot be read."""
    filesystem, root = store.opened
    with contextlib.suppress(OSError), filesystem.open_input_file(f"{root}/{inside(path)}") as file:
        length = min(_TAIL, file.size())
        return bytes(file.read_at(length, file.size() - length)).decode(errors="replace")
    return ""
