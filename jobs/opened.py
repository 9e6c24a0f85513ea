"""The prologue that every verb shares: the run, its lease, the log, the cluster, and the proof that every node sees the run."""

from __future__ import annotations

import os

from jobs.terminal import QUIET, Session
from pipeline.config import Run
from pipeline.store import lease
from pipeline.store.directory import Store


def open_run(uri: str) -> tuple[Store, Run]:
    """A run that was started, and its settings. Raises UserError where there is none."""
    store = Store(uri)
    return store, store.load_run()


def hold(out: Session, store: Store) -> lease.Lease:
    """The lease of a run directory until the verb ends. Raises UserError that says who holds it."""
    return out.exits.enter_context(lease.held(store))


def start(out: Session, store: Store, address: str | None, held: Store | None = None) -> None:
    """Begin to work on a run: its log, the Ray cluster, and every node's view of the folder whose lease is held.

    `held` is that folder, where it is not the run's own.

    Raises UserError when no cluster answers, or naming the node that does not see the run.
    """
    from actors import cluster

    out.log_to(store)
    names = (*QUIET, "EGRSD_DEBUG")
    cluster.connect(address, {name: os.environ[name] for name in names if name in os.environ})
    cluster.check_reach(held or store)
