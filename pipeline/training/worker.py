"""Ray Train: one `TorchTrainer.fit()` that lives for the whole run and takes rounds as they are committed.

Starting the workers takes longer than a round, so they start once per run. A rank that dies ends its worker group, and a new
group resumes from the latest published policy. An EgrsdError (bad settings, a loss that is not finite) would happen again, so it
ends the trainer at once. rank.py has the work of a rank.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig  # ray.train types them as of v1

from pipeline.config import Placement, Run
from pipeline.errors import EgrsdError, TrainingError, first_line
from pipeline.fit import builds
from pipeline.live import card
from pipeline.notices import tell
from pipeline.overrides import load
from pipeline.store.directory import Store
from pipeline.store.files import RAY_FOLDER
from pipeline.training import leaders

_CONTROLLER_DIED = (RayActorError, OutOfMemoryError)  # Ray's memory monitor raises an error of its own kind
# Ranks wait in a collective while rank 0 writes a state or a slow store answers. Ray's half an hour would end them each time.
# Stopped and dead ranks are found by other means, so this deadline is only for a network that has fallen silent.
_COLLECTIVE = timedelta(days=1)
_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
MOST_SAID = 300  # characters of an error of Ray, which may be a page in one line


class Handle:
    """A trainer that runs in a thread of the driver's process, while its ranks are Ray workers."""

    def __init__(self, store: Store, run: Run) -> None:
        self._store = store
        self._error: EgrsdError | None = None
        self._thread = threading.Thread(target=self._work, args=(store, run), name="egrsd-trainer", daemon=True)
        self._thread.start()

    def running(self) -> bool:
        """Whether the trainer still takes rounds."""
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the trainer has ended, for at most `timeout` seconds. After a timeout `running()` is still true.

        Raises the error that ended the trainer (TrainingError, UserError, StoreError).
        """
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error

    def stop(self, timeout: float) -> bool:
        """Ask the trainer to end after its present step. Returns whether it has ended within `timeout` seconds. Raises nothing.

        Workers that still wait for room in the cluster cannot read the request. The request then stays in the store, and a worker
        that starts later ends at once. `start` removes it.
        """
        self._store.request_stop()
        self._thread.join(timeout)
        if not self.running():
            self._store.request_stop(False)
        return not self.running()

    def _work(self, store: Store, run: Run) -> None:
        try:
            fit(store, run)
        except EgrsdError as error:
            self._error = error
        except Exception as error:
            self._error = TrainingError(f"Ray Train could not run ({type(error).__name__}: {first_line(error)[:MOST_SAID]})")
            self._error.__cause__ = error
        finally:
            store.delete(RAY_FOLDER)


def start(store_uri: str, run: Run) -> Handle:
    """Start to train the rounds of a run in Ray workers, from its latest policy on. Returns at once.

    The trainer ends after round `run.rounds - 1`, on `store.request_stop()`, or with an error that the handle reports. An older
    request to stop was meant for another trainer, so it is removed.
    """
    store = Store(store_uri)
    store.exists()  # from here on nothing is written when the run's folder has gone
    store.request_stop(False)
    return Handle(store, run)


def fit(store: Store, run: Run) -> None:
    """Train until the run is complete or a stop is requested. Blocks.

    A worker group or a controller that dies is replaced, at most `run.train.max_failures` times between two policies. A run that
    makes progress may therefore lose any number of machines. Ray Train's own FailureConfig would also retry after an EgrsdError,
    so the retry loop is here. Ranks that find no room in time end the trainer at once: engines hold their cards meanwhile.

    Raises the EgrsdError of a rank, or TrainingError.
    """
    deaths, reached = 0, store.latest_policy()
    while True:
        try:
            with leaders.Watch(run.train.stall_timeout_s, asked=_asked(run)):
                _trainer(store, run).fit()
            return
        except (TrainingFailedError, *_CONTROLLER_DIED) as error:  # a rank failed, or Ray Train's controller died
            if (understood := _understood(error)) is not None:
                raise understood from None
            if store.stop_requested() or not ray.is_initialized():
                return
            before, reached = reached, store.latest_policy()
            if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                raise TrainingError(
                    f"the ranks found no room within {float(os.environ[_START_TIMEOUT]):g} s. They ask for {_asked(run)}",
                    f"train.placement, policy {reached}",
                    f"Add nodes, or lower train.workers or engines; {_START_TIMEOUT} sets the time. The same command resumes",
                ) from None
            deaths = 1 if reached > before else deaths + 1
            if isinstance(error, _CONTROLLER_DIED):
                leaders.end_left()
            if deaths > run.train.max_failures:
                raise TrainingError(
                    f"worker groups died {deaths} times, the last one because: {_reason(error)}",
                    f"policy {reached}",
                    "Look at memory and nodes, then run the same command again: it resumes from this policy",
                ) from error
            tell("worker group", f"training: a worker group ended ({_reason(error)}). It goes on from policy {reached}.")


def train_loop(config: dict[str, Any]) -> None:
    """The program that Ray Train runs in every rank.

    `config` has `store`, the settings `run` as plain JSON, and the name of the `card` that an engine shares, or None.
    """
    import torch
    from torch import distributed as dist

    from pipeline.training import rank

    if dist.is_initialized():  # only now: ranks that cannot reach each other at the start fail after Ray's half an hour
        dist.distributed_c10d._set_pg_timeout(_COLLECTIVE)
    builds.check()
    run = load(config["run"])
    # without a GPU from Ray, get_device takes the first GPU of the machine, which may be an engine's
    device = get_device() if run.train.placement.gpus else torch.device("cpu")
    rank.train(config["store"], run, device, card.Card(config["card"]) if config["card"] else None)


def _trainer(store: Store, run: Run) -> Any:
    place = run.train.placement
    shared = card.name_here() if run.engines.rollout.colocate else None
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(run.train.stall_timeout_s)  # a thread of its own answers
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # Ray Train reads these variables in the driver only
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a lost node is handled like a lost rank
    os.environ.setdefault(_START_TIMEOUT, "1800")  # the autoscaler may have to start train nodes first
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # a relative model path means the same in a rank
    return TorchTrainer(
        train_loop,
        train_loop_config={"store": store, "run": run.model_dump(mode="json"), "card": shared},
        torch_config=TorchConfig(backend="nccl" if place.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=run.train.workers,
            use_gpu=place.gpus > 0,
            resources_per_worker=_of_one(place),
            label_selector=place.labels or None,
        ),
        run_config=RunConfig(  # type: ignore[arg-type]
            name="run",
            storage_path=store.locate(RAY_FOLDER),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # `fit` tries again
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _of_one(place: Placement) -> dict[str, float]:
    """The resources of one rank, by Ray's names."""
    return {"CPU": place.cpus, **({"GPU": place.gpus} if place.gpus else {}), **place.resources}


def _asked(run: Run) -> str:
    """What the ranks ask of the cluster together, in words."""
    place = run.train.placement
    amounts = [f"{amount:g} {name}" for name, amount in _of_one(place).items() if amount]
    return f"{run.train.workers} x ({', '.join([*amounts, *(f'{key}={value}' for key, value in place.labels.items())])})"


def _understood(error: Exception) -> EgrsdError | None:
    """The EgrsdError that ended a rank, or None. The other ranks then fail in a collective, as that rank is missing from it."""
    failures = getattr(error, "worker_failures", {}).values()
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]  # Ray Train wraps what the loop raised
    return next((cause for cause in causes if isinstance(cause, EgrsdError)), None)


def _reason(error: Exception) -> str:
    if "health check has been hanging" in str(error):
        return "a rank gave no sign of life"
    if isinstance(error, OutOfMemoryError):
        return "memory ran out, and Ray ended Ray Train's controller"
    if isinstance(error, RayActorError):
        return "Ray Train's controller died"
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:MOST_SAID]
