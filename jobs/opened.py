"""The prologue that all verbs share: open the run, take its lease, start the log, join the cluster, check nodes and room.

No verb joins a cluster, opens a run directory or takes a lease in another way. `actors.cluster` is imported only where a verb
needs Ray: Ray reads some environment variables at its import, and the session must have set them before.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from actors.folders import check_folders, ray_folder
from jobs.screen import keeper
from jobs.screen.progress import phase
from jobs.screen.terminal import QUIET, Session
from pipeline.config import Run
from pipeline.errors import UserError, command
from pipeline.fit.versions import changed_code
from pipeline.live import lease
from pipeline.store import replaced
from pipeline.store.directory import Store
from pipeline.store.private import private_folder

if TYPE_CHECKING:
    from actors.resources import Demand
    from pipeline.fit.machine import Facts


class Held(NamedTuple):
    """A run that was started, its settings as they were read under the lease, and the lease."""

    store: Store
    run: Run
    lease: lease.Lease


def open_folder(uri: str) -> Store:
    """The store at a local path, or at any URI that pyarrow.fs opens. It may hold no run yet."""
    return Store(uri)


def open_run(uri: str) -> tuple[Store, Run]:
    """A run that was started, and its settings, for reading only. Raises UserError when there is none."""
    store = open_folder(uri)
    return store, store.load_run()


def hold_run(out: Session, uri: str, replaces: bool = False) -> Held:
    """A run that was started, with its lease until the verb ends. `replaces` as in `holding_for`.

    Raises UserError when there is no run, or when another command holds its lease.
    """
    store, _ = open_run(uri)
    holding = hold(out, store, replaces)
    return Held(store, store.load_run(), holding)  # read again: another command may have changed the settings before


def hold(out: Session, store: Store, replaces: bool = False) -> lease.Lease:
    """The lease of a folder until the verb ends. Raises UserError as `holding_for` does."""
    return out.exits.enter_context(holding_for(out, store, replaces))


@contextlib.contextmanager
def holding_for(out: Session, store: Store, replaces: bool = False) -> Iterator[lease.Lease]:
    """The lease of a folder for the length of a block. Raises UserError that names the command which holds it.

    replaces: whether the verb may go on with a `train --replace` that was killed. For others this is an error: they would write
    the traces of later rounds again, with new policies, and the old ones of both would be gone.

    The verb ends when the folder has gone, or when another driver has taken the run over. A keeper frees the lease when this
    process ends without doing so. Policies that a killed `train --replace` has set aside are put back first.
    """
    out.held.append(store)
    keeper.tell(holds=store.uri)
    try:
        with lease.held(store, pid=keeper.main_pid(), on_gone=out.end, on_free=lambda: keeper.tell(frees=store.uri)) as holding:
            line = replaced.settle(store)
            if line and not replaces and replaced.is_going_on(store):
                again = command("train", "--run", store.uri)
                raise UserError(line.rstrip("."), store.uri, f"Run {again} to its end first")
            if line:
                out.say(line)
            yield holding
    finally:
        out.held.remove(store)


def begin(out: Session, store: Store) -> None:
    """Begin work on a run without a cluster: start its log, and say when the code has changed."""
    out.log_to(store)
    recorded = store.run_file()
    if recorded is not None and (line := changed_code(recorded.versions)):
        out.say(line)


def start(out: Session, store: Store, address: str | None, asked: Sequence[Demand] = (), held: Store | None = None) -> None:
    """Begin work on a run: start its log, join the cluster, check that every node has this code and sees the run, and find room.

    `asked` is what the verb takes of the cluster at one time. `held` is the folder of the lease when it is not the run's own.
    When an autoscaler may add what is missing, a line says so and the verb goes on.

    Raises UserError when no cluster answers, or when a node has other code or does not see the run. Raises ResourceError when
    the cluster can never hold what is asked.
    """
    _stay_at_home(address)
    from actors import cluster

    begin(out, store)
    names = (*QUIET, "EGRSD_DEBUG")
    who = "starting Ray on this machine" if cluster.is_local(address) else f"joining the Ray cluster {address or ''}".rstrip()
    with phase(out, who):
        join(out, address, {name: os.environ[name] for name in names if name in os.environ})
        if not cluster.is_local(address):  # here workers have no other code, and each of them looks before it works
            cluster.check_nodes()
        cluster.check_reach(held or store)
    if lacking := cluster.check_room(list(asked)):
        out.say(f"the cluster's autoscaler is asked for nodes: {lacking}.")


def join(out: Session, address: str | None, environment: dict[str, str]) -> None:
    """Join the cluster, watch it while the verb works, and leave it at the end. A keeper removes what lies in temporary folders.

    Raises UserError when no cluster answers, and when a folder that Ray needs on this machine takes no files.
    """
    from actors import cluster, watch

    if cluster.is_local(address):
        check_folders()
        if keeper.is_kept():
            environment["TMPDIR"] = tempfile.mkdtemp(prefix="run-", dir=private_folder())
            keeper.tell(folder=environment["TMPDIR"])
            if not out.debug:
                keeper.tell(ray=str(ray_folder()))
    keeper.tell(joins=address or "local")
    joined = cluster.connect(address, environment)
    out.listen()  # Ray has taken SIGTERM
    out.heed()
    if joined and keeper.is_kept():
        if (folder := watch.session_folder()) is not None and not out.debug:
            keeper.tell(folder=folder)
            keeper.tell(ray=None)
        out.exits.callback(watch.leave)
        out.exits.enter_context(watch.watching(out.say, out.end, lambda: out.asked is not None, out.log_path))


def _stay_at_home(address: str | None) -> None:
    """Let a Ray that starts on this machine listen on the loopback address only. Ray reads this when it is imported.

    The variable's name speaks of other systems: there Ray uses the loopback address by itself, and only there it has an option.
    """
    if not (address or os.environ.get("RAY_ADDRESS")):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def look_at(out: Session, address: str) -> dict[str, Facts | str]:
    """Join a cluster and return the facts of every node by its address. A node that fails gives the reason instead.

    Raises UserError when no cluster answers.
    """
    from actors import cluster

    join(out, address, {})
    return cluster.gather_nodes()
