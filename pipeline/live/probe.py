"""Checks whether a place can hold a run: a probe is written there, read back and deleted."""

from __future__ import annotations

import os
import shutil
from uuid import uuid4

from pipeline.fit.machine import Line
from pipeline.live.lease import TTL_S, living_holder
from pipeline.store.directory import Store


def judge_store(store: Store) -> list[Line]:
    """Write, read back and delete a probe, and say who holds the lease. A folder that did not exist is removed again.

    Raises StoreError, UserError or OSError when nothing can be written.
    """
    name, data = f"doctor-{uuid4().hex}", os.urandom(64)
    root = store.local_root
    new = root is not None and not root.exists()
    store.write(name, data)
    same = store.read_bytes(name) == data
    store.delete(name)
    if new and root is not None:
        shutil.rmtree(root / ".tmp", ignore_errors=True)
        root.rmdir()
    holder = None if new else living_holder(store, TTL_S)
    if not same:
        return [Line("error", "store", f"{store.uri} gives back other bytes than were written. Use another place")]
    held = Line("warning", "lease", f"{holder} is working on this run. Wait for it or stop it")
    return [
        Line("ok", "store", f"{store.uri}: a probe was written, read back and deleted"),
        held if holder else Line("ok", "lease", "free"),
    ]
