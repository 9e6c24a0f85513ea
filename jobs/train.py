"""`egrsd train`: the trainer alone, on rounds that are committed. No engine is started."""

from __future__ import annotations

import time

from jobs.session import connect, session, versions
from pipeline.config import differences, resolve
from pipeline.errors import SettingError, UserError
from pipeline.store import Store, area


def train_committed(uri: str, from_round: int | None, sets: list[str], address: str | None, debug: bool) -> None:
    """Train every committed round that has no policy yet; with `from_round` that round and the later ones again.

    `sets` may change `objective` and `train`. Raises UserError when there is nothing to train on.
    """
    store = Store(uri)
    with session(debug, store if store.exists() else None) as out:
        old = store.load_run()
        run = resolve(old, sets)
        for name, _, _ in differences(old, run):
            if name.split(".")[0] not in {"objective", "train"}:
                raise SettingError("training does not read this setting", name, "Use `egrsd stage` or `egrsd distill`")
        first = store.latest_policy() if from_round is None else from_round
        committed = committed_from(store, first)
        if not committed:
            raise UserError(
                f"round {first} is not committed", store.uri, "`egrsd status` shows which are; `egrsd distill` makes them"
            )
        if run != old:
            store.save_run(run, versions())
        for version in [v for v in store.numbers("policy") if v > first]:
            store.delete(area("policy", version))
            store.delete(area("train", version))
        connect(address)
        from pipeline.training import worker

        last = committed[-1] + 1
        trainer = worker.start(store.uri, run.model_copy(update={"rounds": last}))
        with out.console.status(f"training rounds {first} to {last - 1}"):
            while not store.has_policy(last):
                if (error := trainer.error()) is not None:
                    raise error
                time.sleep(0.1)
            trainer.join()
        out.say(f"trained rounds {first} to {last - 1}; policy {last} is {store.locate(area('policy', last))}")


def committed_from(store: Store, first: int) -> list[int]:
    """Rounds from `first` on that are committed without a gap."""
    found = []
    while store.ready(first) is not None:
        found.append(first)
        first += 1
    return found
