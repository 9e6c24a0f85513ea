"""`egrsd train`: train on committed rounds, without engines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from actors.resources import Demand
from jobs.opened import Held, hold, hold_run, open_folder, open_run, start
from jobs.screen.progress import spinner
from jobs.screen.terminal import Session, session
from pipeline.config import Run
from pipeline.config.objective import approximation
from pipeline.driver import until_end
from pipeline.errors import SettingError, TrainingError, UserError, command, refuse_unread
from pipeline.evidence import trackers
from pipeline.fit.versions import versions
from pipeline.inspection.remaining import trainable_rounds
from pipeline.notices import NOTICE_S, late
from pipeline.overrides import differences, refuse_unread_objective, resolve
from pipeline.rounds import contents
from pipeline.rounds.inventory import commit_round
from pipeline.rounds.metrics import agreement
from pipeline.rounds.refused import refuse_mixed_control, refuse_wide_bounds
from pipeline.rounds.round import Round, open_rounds
from pipeline.rounds.rows import left_out
from pipeline.store import replaced
from pipeline.store.directory import Store, area
from pipeline.training.agreement import base_model


@dataclass(frozen=True)
class Target:
    """Where policies go that are trained again: into the new run `out`, or in place of the old ones with `replace`."""

    replace: bool = False
    out: str | None = None


def train_committed(
    uri: str, from_round: int | None, sets: list[str], address: str | None, debug: bool, target: Target | None = None
) -> None:
    """Train every measured round that has no policy yet. With `from_round`, train that round and the later ones again.

    The stored traces are used, and the rounds are committed as they are now. `sets` may change `objective`, `train` and
    `metrics`. Old policies are set aside after all checks, and deleted once the new ones are there.

    Raises SettingError for another setting, and for policies that would be replaced without `target`. Raises TrainingError when
    the trainer ends before its last policy. Raises StoreError when a run that is copied changes meanwhile.
    """
    with session(debug) as out:
        into = target.out if target is not None else None
        held = hold_run(out, uri, replaces=True) if into is None else None
        store, old = (held.store, held.run) if held is not None else open_run(uri)  # with --out it may be read only
        if into is not None and replaced.is_going_on(store):
            what = "a `train --replace` is going on there, or was cut off, so its policies and settings are not those of before"
            raise UserError(what, store.uri, f"Wait for its end, or run {command('train', '--run', store.uri)} to it")
        run = resolve(old, sets)
        changed = differences(old, run)
        refuse_unread(
            "training does not read this setting",
            (setting for setting, _, _ in changed),
            lambda setting: setting.split(".")[0] in {"objective", "train", "metrics"},
            lambda _: "Use `egrsd stage` or `egrsd distill`",
        )
        refuse_unread_objective([run], sets)
        refuse_mixed_control(run.objective)
        trackers.check(run)
        first = store.latest_policy() if from_round is None else from_round
        rounds = trainable_rounds(store, run, first)
        models = contents.look(run)
        remedy = contents.way_out(store) if into is None else "Put the old model back"  # the run may be another person's
        contents.refuse_changes(store, models, accept=False, remedy=remedy)
        if into is not None:
            held = _new_run(out, store, run, into, rounds)
            rounds = trainable_rounds(held.store, run, first)
        assert held is not None
        _check_replaced(held.store, first, target, out)
        last = rounds[-1].number + 1
        start(out, held.store, address, [Demand("train", run.train.workers, run.train.placement)])
        for note in approximation(run.objective, run.score):
            out.say(note)
        for setting, was, now in changed:
            out.say(f"run.json: {setting} was {was!r}, now {now!r}.")
        from pipeline.training import worker  # imports Ray, which reads the environment that `start` has set

        contents.keep(held.store, run, models)
        with _replacing(held, run, first, out):
            for work in rounds:
                refuse_wide_bounds(work)
                commit_round(work, left_out(work))
            with (
                trackers.feeding(held.store, run, out.say, held.lease),
                spinner(out, f"training rounds {first} to {last - 1}"),
                until_end(worker.start(held.store.uri, run.model_copy(update={"rounds": last})), held.lease) as trainer,
                late("trainer", f"the trainer has worked on rounds {first} to {last - 1} for {NOTICE_S:g} s so far."),
            ):
                trainer.join()
            held.store.delete(base_model.ADAPTER)  # of a distillation that was killed: here are no engines to compare
            if not held.store.has_policy(last):
                what = f"the trainer ended before it published policy {last}"
                raise TrainingError(what, held.store.uri, "Run the same command again")
        gap = agreement(row for row in held.store.metrics() if first <= row["round"] < last)
        out.told.result = {"rounds": [first, last - 1], "policy": last, "run": held.store.uri, "trainer_engine": gap}
        out.say(f"trained rounds {first} to {last - 1}; policy {last} is {held.store.locate(area('policy', last))}")
        if gap is not None:
            out.say(f"trainer - engine: {gap}")


def _new_run(out: Session, old: Store, run: Run, uri: str, rounds: list[Round]) -> Held:
    """A new run with the rounds of the old one, and its policies up to the first of `rounds`, which will be trained.

    Nothing is written to the old run, and its lease is not taken: it may be another person's. Raises SettingError when there is
    a run already, and StoreError when the old one has changed while it was copied.
    """
    store = open_folder(uri)
    holding = hold(out, store)
    if store.exists():
        raise SettingError(
            "a run is there already", f"--out {uri}", f"Go on with {command('train', '--run', uri)}, or name another"
        )
    with spinner(out, f"copying the rounds into {store.uri}"):
        replaced.copy_until(old, store, rounds[0].number)
        replaced.check_copy(old, store, [work.area for work in open_rounds(store, run) if work.number <= rounds[-1].number])
    store.save_run(run, versions())  # last: without it there is no run, and the same command copies again
    return Held(store, run, holding)


def _check_replaced(store: Store, first: int, target: Target | None, out: Session) -> None:
    """Say which policies will be replaced. Raises SettingError when that was not asked for."""
    going = [version for version in replaced.later_policies(store, first) if store.has_policy(version)]
    if not going:
        return
    named = ", ".join(f"{version} ({replaced.policy_hash(store, version)})" for version in going)
    if target is None or not target.replace:
        what = f"would replace policies {named} of this run"
        raise SettingError(what, f"--from-round {first}", "Train into a new run with --out NEWRUN, or pass --replace")
    out.say(f"replaces policies {named}. They stay in policy/*.replaced-* until the new ones are there.")


@contextlib.contextmanager
def _replacing(held: Held, run: Run, first: int, out: Session) -> Iterator[None]:
    """Set old policies aside for the length of a block, and delete them after it.

    When it fails before the first new policy, the old policies and the old settings are put back. Where the trainer has not ended
    yet, its request to stop is still there, and the next command does this. A run that another command has taken over is left.
    """
    try:
        replaced.set_aside(held.store, first)
        held.store.save_run(run, versions())
        yield
    except BaseException:
        if not held.lease.is_lost():
            is_ended = not held.store.stop_requested()
            line = replaced.settle(held.store) if is_ended else "the trainer has not ended yet: the next command tidies up."
            if line:
                out.say(line)
        raise
    replaced.drop(held.store)
