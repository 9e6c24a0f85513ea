"""`egrsd train`: the trainer alone, on rounds that are committed. No engine is started."""

from __future__ import annotations

from actors import resources
from actors.pool import check_room
from jobs.session import check_reach, connect, session, versions
from pipeline.config import Run, differences, resolve
from pipeline.errors import SettingError, TrainingError, UserError
from pipeline.evidence import trackers
from pipeline.rounds.inventory import Inventory, commit_round
from pipeline.rounds.round import Round, open_rounds
from pipeline.stages import MEASURE
from pipeline.store import lease
from pipeline.store.directory import Store, area
from pipeline.store.folders import MANIFEST
from pipeline.training import worker

END_S = 30.0


def train_committed(uri: str, from_round: int | None, sets: list[str], address: str | None, debug: bool) -> None:
    """Train every measured round that has no policy yet; with `from_round` that round and the later ones again, on the traces
    that are stored, and commit them as they are now.

    `sets` may change `objective` and `train`. Nothing is dropped before all that can be checked has been.
    """
    with session(debug) as out:
        store = Store(uri)
        store.load_run()
        holding = out.exits.enter_context(lease.held(store))
        old = store.load_run()
        run = resolve(old, sets)
        for name, _, _ in differences(old, run):
            if name.split(".")[0] not in {"objective", "train", "metrics"}:
                raise SettingError("training does not read this setting", name, "Use `egrsd stage` or `egrsd distill`")
        trackers.check(run)
        first = store.latest_policy() if from_round is None else from_round
        rounds = trainable(store, run, first)
        out.log_to(store)
        connect(address)
        check_reach(store)
        if lacking := check_room([resources.Demand("train", run.train.workers, run.train.placement)]):
            out.say(f"the cluster's autoscaler is asked for nodes: {lacking}.")
        store.save_run(run, versions())
        for work in rounds:
            commit_round(work)
        for version in reversed([v for v in store.numbers("policy") if v > first]):  # cut off here, the latest stays the latest
            store.delete(f"{area('policy', version)}/{MANIFEST}")
            store.delete(area("policy", version))
            store.delete(area("train", version))
        last = rounds[-1].number + 1
        with trackers.feeding(store, run, out.say, holding), out.console.status(f"training rounds {first} to {last - 1}"):
            trainer = worker.start(store.uri, run.model_copy(update={"rounds": last}))
            out.exits.callback(trainer.stop, END_S)
            trainer.join()
        if not store.has_policy(last):
            raise TrainingError(f"the trainer ended before it published policy {last}", store.uri, "Run the same command again")
        out.say(f"trained rounds {first} to {last - 1}; policy {last} is {store.locate(area('policy', last))}")


def trainable(store: Store, run: Run, first: int) -> list[Round]:
    """Rounds from `first` on that are measured, without a gap. Raises UserError when there is none, when a stage of one is
    stale, or when the training state that stood beside policy `first` is no longer kept."""
    if first and store.read_bytes(f"{area('train', first)}/{MANIFEST}") is None:
        kept = ", ".join(map(str, [0, *store.numbers("train")]))
        raise UserError(
            f"the training state beside policy {first} is not kept", store.uri, f"Train from one of these rounds: {kept}"
        )
    found: list[Round] = []
    for work in open_rounds(store, run):
        if work.number != first + len(found):
            continue
        seen = Inventory(work)
        # the policy that wrote a trace may have been trained again since: stored traces are what this trains on
        reasons = {name: why for name in MEASURE for why in seen.reasons(name) if why != "policy changed"}
        if set(reasons.values()) == {"missing"}:
            break
        if work.lag > run.max_staleness:
            what = f"was rolled out by policy {work.policy_version}, more than max_staleness {run.max_staleness} behind"
            raise UserError(what, work.area, f"It was made under max_staleness {work.lag}: allow that again")
        for name, why in reasons.items():
            raise UserError(f"{name} is stale ({why})", work.area, f"Run `egrsd stage {name} --round {work.number}` first")
        found.append(work)
    if not found:
        raise UserError(f"round {first} is not measured", store.uri, "`egrsd status` shows which are; `egrsd distill` makes them")
    return found
