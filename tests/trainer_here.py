"""The trainer in a thread of the test's process. Ray Train's five processes take far longer to start than a tiny round to train.

Tests of the rounds and policies of a trainer use it. Other tests use real Ray Train to see how ranks start, die, stop and report.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from pipeline.config import Run
from pipeline.live import card
from pipeline.store.directory import Store
from pipeline.training import worker


@contextlib.contextmanager
def instead_of_ray_train() -> Iterator[None]:
    """Let a block train in this process."""
    with mock.patch.object(worker, "fit", fit):
        yield


def fit(store: Store, run: Run) -> None:
    """Stands in for `worker.fit`: trains every round as it is committed, until the run is complete or a stop is requested."""
    import torch

    from pipeline.training import rank  # imports peft, for which the collection of tests should not wait

    rank.train(store, run, torch.device("cpu"), card.Card(card.name_here()) if run.engines.rollout.colocate else None)
