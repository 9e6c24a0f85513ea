"""What a run has learned, round by round, read from its metrics alone. And all runs below a folder."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from textwrap import shorten

import pyarrow.fs as pafs

from pipeline.errors import EgrsdError, StoreError, UserError
from pipeline.inspection.ended import last_error
from pipeline.live.lease import LEASE, is_dead, read_lease
from pipeline.rounds.tally import tally_of
from pipeline.store import owner
from pipeline.store.directory import Store

# (writer, name of the metric, what it is called, factor, digits) of every line, in order
MEASURES = (
    ("round", "accuracy", "accuracy, %", 100.0, 1),
    ("round", "mean_length", "length, tokens", 1.0, 1),
    ("round", "mean_reward", "reward", 1.0, 3),
    ("round", "student_entropy", "entropy of the student, nats", 1.0, 3),
    ("round", "teacher_entropy", "entropy of the teacher, nats", 1.0, 3),
    ("train", "logprob_gap", "gap of engine and trainer, nats", 1.0, 4),
)
_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDEST = 32  # blocks of a sparkline
_WIDEST_ERROR = 72  # characters of the reason why a command ended
_DEEPEST = 4  # folders below the one that is listed


def by_round(store: Store) -> dict[str, dict[int, float]]:
    """Value of each measure by round, by the name of its metric. Of several steps of a round the first one with a value counts.

    A measure that the run does not have is empty. Raises StoreError for damaged metrics.
    """
    found: dict[str, dict[int, float]] = {name: {} for _, name, *_ in MEASURES}
    for row in store.metrics():
        for writer, name, *_ in MEASURES:
            value = row.get(name)
            if row["writer"] == writer and isinstance(value, int | float):
                found[name].setdefault(int(row["round"]), float(value))
    return found


def sparkline(values: list[float]) -> str:
    """Values as blocks of eight heights, from the least to the largest. Long lists become means of neighbours."""
    if len(values) > _WIDEST:
        size = len(values) / _WIDEST
        parts = [values[int(place * size) : max(int((place + 1) * size), int(place * size) + 1)] for place in range(_WIDEST)]
        values = [sum(part) / len(part) for part in parts]
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = high - low
    return "".join(_BLOCKS[round((value - low) / span * 7) if span else 3] for value in values)


@dataclass(frozen=True)
class Listed:
    """One run of a list. accuracy, length: of the traces of its last round with figures. when: of the last change, UTC.

    base: accuracy of the base on the held-out problems, where no round has figures yet.
    """

    uri: str
    recipe: str
    rounds: int
    of: int
    accuracy: float | None
    length: float | None
    when: str
    state: str
    base: float | None = None


def listed(uri: str, passed: Callable[[str], None] = lambda _: None) -> Iterator[Listed]:
    """The runs in a folder and below it, in the order of their paths. Folders inside a run are not looked into.

    `passed` gets each folder below `uri` that may not be read. Raises UserError when `uri` itself may not be read.
    """
    for found in _runs(Store(uri), 0, passed):
        yield _listed(found)


def _runs(folder: Store, depth: int, passed: Callable[[str], None]) -> Iterator[Store]:
    try:
        kinds = folder.kinds("")
    except UserError:
        if not depth:
            raise
        passed(folder.uri)
        return
    if kinds.get("run.json") == pafs.FileType.File:
        yield folder
        return
    below = [name for name, kind in kinds.items() if kind == pafs.FileType.Directory and not name.startswith(".")]
    for name in below if depth < _DEEPEST else []:
        yield from _runs(Store(folder.locate(name)), depth + 1, passed)


def _listed(store: Store) -> Listed:
    """What a list shows of one run. A damaged run says what is wrong in the place of its state."""
    try:
        run = store.load_run()
        figures, trained = by_round(store), store.latest_policy()
        last = max(figures["accuracy"], default=None)
        accuracy, length = (figures[name].get(last) if last is not None else None for name in ("accuracy", "mean_length"))
        base = tally_of(store, run, 0) if last is None else None
        state = _state(store, trained >= run.rounds)
        shown = base.accuracy if base is not None else None
        return Listed(store.uri, run.name, trained, run.rounds, accuracy, length, _changed(store), state, shown)
    except EgrsdError as error:
        state = f"damaged: {error.what}" if isinstance(error, StoreError) else error.what
        return Listed(store.uri, "", 0, 0, None, None, _changed(store), state)


def _state(store: Store, is_done: bool) -> str:
    lease = read_lease(store)
    if lease is not None and lease.host != owner.host():  # perhaps it has ended long ago, which nobody here can see
        beat = _latest(store, [LEASE])
        return f"held by {lease.holder}" + (f", last beat {beat} UTC" if beat else "")
    if lease is not None and not is_dead(lease):
        return f"at work: {lease.holder}"
    if is_done:
        return "done"
    begun = "begun" if store.numbers("rounds") or store.numbers("evals") else "new"
    error = last_error(store)
    return begun if error is None else f"{begun}; ended: {shorten(error, _WIDEST_ERROR, placeholder=' ...')}"


def _changed(store: Store) -> str:
    """When the run's newest policy or metrics were written, as a date; "" where nobody knows."""
    return _latest(store, ["run.json", "policy", "metrics", "rounds"])


def _latest(store: Store, names: list[str]) -> str:
    """When the newest of these files and folders was written, as a date in UTC; "" where nobody knows."""
    filesystem, root = store.opened
    with contextlib.suppress(OSError):
        infos = filesystem.get_file_info([f"{root}/{name}" for name in names])
        times = [info.mtime for info in infos if info.mtime is not None]
        if times:
            return max(times).astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    return ""
