"""The trainer in a thread of the test's process: Ray Train's five processes take far longer to start than a tiny round to train.

For tests of what is trained on and what comes of it. How ranks start, die, stop and report is tested on real Ray Train elsewhere.
"""

from __future__ import annotations

import torch

from pipeline.config import Run
from pipeline.store.directory import Store
from pipeline.training import worker


def fit(store: Store, run: Run) -> None:
    """In the place of `worker.fit`: train every round as it is committed, until the run is complete or asked to stop."""
    trainer = worker.resume(store, run, torch.device("cpu"))
    for number in range(store.latest_policy(), run.rounds):
        if not worker.wait(store, number) or not worker.train_round(trainer, store, number):
            return
