"""The prologue that every verb shares: the run, its lease, the log, the cluster, every node's view of the run, and its room.

No verb joins a cluster, opens a run directory or takes a lease in another way.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jobs.terminal import QUIET, Session
from pipeline.config import Run
from pipeline.store import lease
from pipeline.store.directory import Store

if TYPE_CHECKING:
    from actors.resources import Demand
    from pipeline.fit.machine import Facts


class Held(NamedTuple):
    """A run that was started, its settings as they are under the lease, and the lease."""

    store: Store
    run: Run
    lease: lease.Lease


def open_folder(uri: str) -> Store:
    """A place that may hold no run yet: a local path, or any URI that pyarrow.fs opens."""
    return Store(uri)


def open_run(uri: str) -> tuple[Store, Run]:
    """A run that was started, and its settings, to be read only. Raises UserError where there is none."""
    store = open_folder(uri)
    return store, store.load_run()


def hold_run(out: Session, uri: str) -> Held:
    """A run that was started, held until the verb ends. Raises UserError where there is none, or that says who holds it."""
    store, _ = open_run(uri)
    holding = hold(out, store)
    return Held(store, store.load_run(), holding)  # again: whoever held the run before may have changed its settings


def hold(out: Session, store: Store) -> lease.Lease:
    """The lease of a folder until the verb ends. Raises UserError that says who holds it."""
    return out.exits.enter_context(holding_for(store))


@contextlib.contextmanager
def holding_for(store: Store) -> Iterator[lease.Lease]:
    """The lease of a folder for the length of a block. Raises UserError that says who holds it."""
    with lease.held(store) as holding:
        yield holding


def start(out: Session, store: Store, address: str | None, asked: Sequence[Demand] = (), held: Store | None = None) -> None:
    """Begin to work on a run: its log, the Ray cluster, every node's view of the folder whose lease is held, and its room.

    `asked` is what the verb will take of the cluster at one time; `held` is the folder whose lease is held, where it is not the
    run's own. Raises UserError when no cluster answers or naming the node that does not see the run, and ResourceError when the
    cluster can never hold what is asked. Where an autoscaler may add what is missing, this says so and goes on.
    """
    from actors import cluster

    out.log_to(store)
    names = (*QUIET, "EGRSD_DEBUG")
    cluster.connect(address, {name: os.environ[name] for name in names if name in os.environ})
    cluster.check_reach(held or store)
    if lacking := cluster.check_room(list(asked)):
        out.say(f"the cluster's autoscaler is asked for nodes: {lacking}.")


def look_at(address: str) -> dict[str, Facts | str]:
    """Join a cluster to look at it: the facts of every node by its address, or why there are none.

    Raises UserError when no cluster answers.
    """
    from actors import cluster

    cluster.connect(address)
    return cluster.gather_nodes()
