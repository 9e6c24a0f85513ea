"""Metrics to TensorBoard, Weights & Biases or MLflow, fed from the files of metrics that every run keeps.

    <run>/metrics/0003-train.jsonl, 0003-round.jsonl  -->  Feeder  -->  a sink      <run>/sinks/<name>.json: the rows it was fed

A sink is one such tracker. It never delays training, because a thread of the driver watches the folder of metrics. Rows that a
sink missed (it was off, it failed, the driver was killed) are fed later, from the files.

No row is counted twice. TensorBoard has one event file per file of rows, and a new event file replaces the old one. W&B drops a
step that it has. The feeder asks MLflow which steps it has. W&B and MLflow cannot remove a point. Rows that have changed since,
because a round was trained again, therefore begin a new run there.

Each client reads its own credentials (WANDB_API_KEY, MLFLOW_TRACKING_TOKEN, ...). None passes through this module.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from pipeline.config import Run
from pipeline.errors import SettingError, first_line
from pipeline.live.lease import Lease
from pipeline.notices import NOTICE_S, late
from pipeline.rounds.metrics import METRICS, has_figures
from pipeline.store.directory import Store, read_figures
from pipeline.store.documents import Count, Document, Sha256
from pipeline.store.names import METRICS_FILE, Plain

log = logging.getLogger(__name__)
POLL_S, RETRY_S, END_S = 2.0, 30.0, 60.0
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")


@dataclass(frozen=True)
class MetricRows:
    """One file of metrics: its writer and its rows. `first` is the number of rows that the sink was fed before them."""

    file: str
    writer: str
    rows: list[dict[str, Any]]
    first: int
    sha256: str

    def points(self) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, values) of every row. A row of the trainer has its optimiser step as step, any other row its round."""
        for row in self.rows:
            at = "step" if "step" in row else "round"
            values = {k: float(v) for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != at}
            yield int(row[at]), {f"{self.writer}/{name}": value for name, value in values.items()}


class Sink(Protocol):
    """The operations of a tracker."""

    def feed(self, rows: MetricRows) -> None:
        """Store one file of rows at the tracker. Raises any error of the tracker's client when that fails."""

    def close(self) -> None:
        """Close the connection to the tracker."""


class TensorBoard:
    """One event file per file of rows, in <run>/tensorboard. Names are in the order of feeding."""

    def __init__(self, store: Store, run: Run, name: str) -> None:  # noqa: ARG002  # all sinks have the same arguments
        self._store = store

    def feed(self, rows: MetricRows) -> None:
        """Write the event file of these rows, or replace an earlier one."""
        from torch.utils.tensorboard import SummaryWriter

        with tempfile.TemporaryDirectory(prefix="egrsd-") as scratch:
            with SummaryWriter(scratch) as writer:
                for step, values in rows.points():
                    for tag, value in values.items():
                        writer.add_scalar(tag, value, step)
            [events] = Path(scratch).iterdir()
            # TensorBoard reads the files of a folder by name and never goes back, so names follow the order of feeding.
            self._store.write(f"tensorboard/events.out.tfevents.{rows.first:010d}.{Path(rows.file).stem}", events.read_bytes())

    def close(self) -> None:
        """Nothing is open between two calls of `feed`."""


class WandB:
    """A W&B run of project `egrsd`. WANDB_MODE=offline keeps it below <run>/wandb."""

    def __init__(self, store: Store, run: Run, name: str) -> None:
        import wandb

        quiet = {"silent": True, "console": "off", "disable_git": True, "save_code": False, "x_disable_stats": True}
        settings = wandb.Settings(**quiet, x_disable_meta=True)  # type: ignore[arg-type]  # no host, no command line, no code
        project = os.environ.get("WANDB_PROJECT", "egrsd")
        config = run.model_dump(mode="json")
        self._run = wandb.init(
            project=project,
            name=name,
            id=name,
            resume="allow",
            dir=_folder(store),
            config=config,
            settings=settings,
            reinit="create_new",
        )
        for writer, metrics in METRICS.items():
            at = f"{writer}/{'step' if writer == 'train' else 'round'}"
            self._run.define_metric(f"{writer}/*", step_metric=at)
            for metric in metrics:
                if metric.reduction in {"mean", "max"}:  # W&B's table of runs shows these; W&B has no sum
                    self._run.define_metric(f"{writer}/{metric.name}", step_metric=at, summary=metric.reduction)

    def feed(self, rows: MetricRows) -> None:
        """Log every row at its place in the run's history. W&B drops a row whose place it already has."""
        for place, (step, values) in enumerate(rows.points(), start=rows.first):
            at = "step" if "step" in rows.rows[0] else "round"
            self._run.log({f"{rows.writer}/{at}": step, **values}, step=place)

    def close(self) -> None:
        """Finish the W&B run in this process. Another process may resume it."""
        self._run.finish()


class MLflow:
    """An MLflow run of experiment `egrsd`, at MLFLOW_TRACKING_URI or in a file store below <run>/mlflow."""

    def __init__(self, store: Store, run: Run, name: str) -> None:
        from mlflow import MlflowClient

        uri = (
            os.environ.get("MLFLOW_TRACKING_URI")
            or f"file://{store.local_root or Path(tempfile.mkdtemp(prefix='egrsd-'))}/mlflow"
        )
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow opens a file store only on request
        self._client = MlflowClient(uri)
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "egrsd")
        found = self._client.get_experiment_by_name(title)
        experiment = found.experiment_id if found else self._client.create_experiment(title)
        runs = self._client.search_runs([experiment], f"tags.egrsd = '{name}'")
        tags = {"egrsd": name, "mlflow.note.content": run.to_yaml()[:5000]}
        self._id = (runs[0] if runs else self._client.create_run(experiment, tags=tags, run_name=name)).info.run_id
        self._partial = True  # a process that was killed may have logged a part of its last file

    def feed(self, rows: MetricRows) -> None:
        """Log every value at its step, except the values that a killed process has logged already."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for step, values in rows.points() for name, value in values.items()]
        if self._partial:
            history = {name: self._client.get_metric_history(self._id, name) for name in {m.key for m in metrics}}
            logged = {(name, point.step) for name, points in history.items() for point in points}
            metrics = [metric for metric in metrics if (metric.key, metric.step) not in logged]
        for start in range(0, len(metrics), 1000):  # MLflow's limit of a batch
            self._client.log_batch(self._id, metrics[start : start + 1000])
        self._partial = False

    def close(self) -> None:
        """Mark the MLflow run as finished. A later process may add to it."""
        self._client.set_terminated(self._id)


OPEN: dict[str, Callable[[Store, Run, str], Sink]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


class Feeder:
    """One sink and the rows it has been fed. `failures` counts its errors. The user sees the first one; the log has all."""

    def __init__(self, name: str, store: Store, run: Run, say: Callable[[str], None]) -> None:
        self.name, self._store, self._run, self._say = name, store, run, say
        self._sink: Sink | None = None
        self._retry_at = 0.0
        self._trusted: set[str] = set()  # files of rows that this process has fed, or has found unchanged
        self.failures = 0

    def catch_up(self, last: bool = False) -> None:
        """Feed the rows that the sink lacks. After an error the next try comes RETRY_S seconds later, or with the `last` call."""
        if time.monotonic() < self._retry_at and not last:
            return
        try:
            self._feed()
        except Exception as error:  # a tracker may raise anything, and must not end a run
            self._failed(error)
        if last:
            self._close()

    def _feed(self) -> None:
        path = f"sinks/{self.name}.json"
        kept = self._store.read_document(path, Fed)
        state = _new_state(self._run) if kept is None else kept.model_dump()
        for rows in pending(self._store, state["fed"], self._trusted):
            again = any(entry["file"] == rows.file for entry in state["fed"])
            if again and self.name != "tensorboard":  # TensorBoard alone can replace a point
                self._store.write_json(path, _new_state(self._run))
                self._trusted.clear()
                self._close()
                return self._feed()
            if self._sink is None:
                self._store.write_json(path, state)  # before the first row: after a crash the next process must find this id
                self._sink = OPEN[self.name](self._store, self._run, state["id"])
            self._sink.feed(rows)
            others = [entry for entry in state["fed"] if entry["file"] != rows.file]
            state["fed"] = [*others, {"file": rows.file, "sha256": rows.sha256, "first": rows.first, "rows": len(rows.rows)}]
            self._store.write_json(path, state)
            self._trusted.add(rows.file)
        return None

    def _close(self) -> None:
        sink, self._sink = self._sink, None
        try:
            if sink is not None:
                sink.close()
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        reason = public(first_line(error))
        self.failures += 1
        self._retry_at = time.monotonic() + RETRY_S
        log.warning("metrics sink %s failed (%s)", self.name, reason)
        if self.failures == 1:
            self._say(
                f"metrics.sinks: {self.name} failed ({reason}). The run goes on; its rows are kept, and are sent when it works."
            )
        self._sink = None


class FedFile(Document):
    """One file of rows that a sink has: its hash, the place of its first row among all rows, and its number of rows."""

    file: Plain
    sha256: Sha256
    first: Count
    rows: Count


class Fed(Document):
    """sinks/<name>.json: the id of the run at the tracker, and the files that were fed."""

    id: Plain
    fed: list[FedFile]


def read_fed(store: Store) -> list[Fed]:
    """What every sink of a run was fed. Raises StoreError for a damaged file."""
    found = [store.read_document(f"sinks/{name}.json", Fed) for name in OPEN]
    return [fed for fed in found if fed is not None]


def pending(store: Store, fed: list[dict[str, Any]], trusted: set[str]) -> Iterator[MetricRows]:
    """Files of rows that were not fed or have changed since, oldest first.

    Files in `trusted` are not read again, and a file that is found unchanged is added to them. A trainer's rows are fed once
    their policy is published, because a worker that dies before may write them again.
    """
    known = {entry["file"]: entry for entry in fed}
    place = max((entry["first"] + entry["rows"] for entry in fed), default=0)
    for name in store.named("metrics", METRICS_FILE):
        file, writer = name[0], name["writer"]
        if file in trusted or (writer == "train" and not store.has_policy(int(name["number"]) + 1)):
            continue
        data = store.read_bytes(f"metrics/{file}") or b""
        digest, old = hashlib.sha256(data).hexdigest(), known.get(file)
        if old is not None and old["sha256"] == digest:
            trusted.add(file)
            continue
        rows = read_figures(data, store.locate(f"metrics/{file}"))
        if writer == "round" and not any(map(has_figures, rows)):  # a driver is about to write them
            continue
        yield MetricRows(file, writer, rows, old["first"] if old else place, digest)
        place += 0 if old else len(rows)


def check(run: Run) -> None:
    """Raise SettingError, with the extra to install, for a sink whose package is missing."""
    for name in run.metrics.sinks:
        if find_spec(name) is None:
            raise SettingError(f"'{name}' is not installed", "metrics.sinks", f"Install it with `pip install 'egrsd[{name}]'`")


@contextlib.contextmanager
def feeding(store: Store, run: Run, say: Callable[[str], None], holding: Lease) -> Iterator[None]:
    """Feed the run's sinks from a thread while a block runs. At its end the thread feeds the remaining rows, for at most END_S.

    Feeding stops when another driver has taken the run.
    """
    feeders = [Feeder(name, store, run, say) for name in run.metrics.sinks]
    end = threading.Event()
    thread = threading.Thread(target=_watch, args=(feeders, end, holding), name="egrsd-sinks", daemon=True)
    if feeders:
        thread.start()
    try:
        yield
    finally:
        end.set()
        if feeders:
            thread.join(END_S)
            if thread.is_alive():
                say(f"metrics.sinks: not done after {END_S:g} s. What is missing is sent when the same command runs again.")
        for feeder in feeders:
            if feeder.failures > 1:
                say(f"metrics.sinks: {feeder.name} failed {feeder.failures} times.")


def catch_up(store: Store, run: Run, say: Callable[[str], None], holding: Lease) -> None:
    """Feed the sinks of a run that has no other work."""
    with feeding(store, run, say, holding):
        pass


def _watch(feeders: list[Feeder], end: threading.Event, holding: Lease) -> None:
    ended = False
    while not ended:
        ended = end.wait(POLL_S)
        for feeder in feeders:
            if holding.stolen_by is None:
                with late(
                    f"sink {feeder.name}", f"metrics.sinks: {feeder.name} has not answered for {NOTICE_S:g} s. The run goes on."
                ):
                    feeder.catch_up(last=ended)


def public(text: str) -> str:
    """`text` without secrets: values of environment variables that are named like secrets, and user and password of a URL."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 6:
            text = text.replace(value, "***")
    return _USER_INFO.sub("***", text)


def _folder(store: Store) -> Path:
    """Folder for a tracker's local files: the run's folder, or a temporary one when the run is in an object store."""
    return store.local_root or Path(tempfile.mkdtemp(prefix="egrsd-"))


def _new_state(run: Run) -> dict[str, Any]:
    """The state of a new run at a tracker: its id, and no rows fed."""
    return {"id": f"{re.sub(r'[^A-Za-z0-9_-]', '-', run.name)[:100]}-{uuid4().hex[:8]}", "fed": []}
