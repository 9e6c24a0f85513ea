"""`egrsd train`: train on committed rounds, without engines."""

from __future__ import annotations

from actors.resources import Demand
from jobs.opened import hold_run, start
from jobs.terminal import session
from pipeline.driver import until_end
from pipeline.errors import TrainingError, refuse_unread
from pipeline.evidence import trackers
from pipeline.fit.versions import versions
from pipeline.overrides import differences, resolve
from pipeline.rounds.inventory import commit_round, withdraw_policies
from pipeline.rounds.remaining import trainable_rounds
from pipeline.store.directory import area
from pipeline.training import worker


def train_committed(uri: str, from_round: int | None, sets: list[str], address: str | None, debug: bool) -> None:
    """Train every measured round that has no policy yet. With `from_round`, train that round and the later ones again.

    The stored traces are used, and the rounds are committed as they are now. `sets` may change `objective`, `train` and
    `metrics`. Old policies are withdrawn only after all checks.

    Raises SettingError for another setting, and TrainingError when the trainer ends before its last policy.
    """
    with session(debug) as out:
        store, old, holding = hold_run(out, uri)
        run = resolve(old, sets)
        refuse_unread(
            "training does not read this setting",
            (setting for setting, _, _ in differences(old, run)),
            lambda setting: setting.split(".")[0] in {"objective", "train", "metrics"},
            lambda _: "Use `egrsd stage` or `egrsd distill`",
        )
        trackers.check(run)
        first = store.latest_policy() if from_round is None else from_round
        rounds = trainable_rounds(store, run, first)
        start(out, store, address, [Demand("train", run.train.workers, run.train.placement)])
        store.save_run(run, versions())
        for work in rounds:
            commit_round(work)
        withdraw_policies(store, first)
        last = rounds[-1].number + 1
        with (
            trackers.feeding(store, run, out.say, holding),
            out.console.status(f"training rounds {first} to {last - 1}"),
            until_end(worker.start(store.uri, run.model_copy(update={"rounds": last})), holding) as trainer,
        ):
            trainer.join()
        if not store.has_policy(last):
            raise TrainingError(f"the trainer ended before it published policy {last}", store.uri, "Run the same command again")
        out.say(f"trained rounds {first} to {last - 1}; policy {last} is {store.locate(area('policy', last))}")
