"""Rounds that overlap: `distill` with the fake engine and the trainer's own loop, in a thread."""

import pathlib
import shutil
from dataclasses import replace
from functools import partial

import pytest
import trainer_here
from waiting import until

from actors.fakes import UNWATCHED, Behaviour, FakeEngine
from jobs import distill, status, train
from jobs.settle import Choices
from pipeline.fit.versions import versions
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.rounds import contents
from pipeline.rounds.origin import read_sources
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import open_rounds
from pipeline.store.directory import Store

ROUNDS = 4
SETS = [
    *UNWATCHED,
    f"rounds={ROUNDS}",
    "rollout.prompts_per_round=4",
    "rollout.prompts_per_shard=2",
    "rollout.group_size=4",
    "grade.advantage=running",  # fake traces are never right: a group of zeros would teach nothing
    "train.batch_traces=8",
    "train.warmup_steps=0",
    "evaluation.problems=0",
]
pytestmark = pytest.mark.timeout(900)


def finished(folder: pathlib.Path, *sets: str) -> Store:
    """A finished run with the fake engine."""
    engine = partial(FakeEngine, behaviour=Behaviour(batch_s=0.2))
    with trainer_here.instead_of_ray_train():
        distill.distill(str(folder), Choices("demo", [*SETS, *sets]), engine_class=engine)
    return Store(str(folder))


@pytest.fixture(scope="module", params=[0, 1])
def overlapped(request, ray_local, tmp_path_factory):
    """(max_staleness, a finished run). Where rounds may overlap, the trainer waits until they do: it might be the faster one."""
    from pipeline.training import rank  # imports peft, for which the collection of tests should not wait

    train_round = rank.train_round

    def after_the_next_has_begun(trainer, store, number, *more):
        if number + 1 < ROUNDS:
            until(lambda: store.entries(f"rounds/{number + 1:04d}", "rollout"), what="the next round begins")
        return train_round(trainer, store, number, *more)

    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr(rank, "train_round", after_the_next_has_begun)
        return request.param, finished(tmp_path_factory.mktemp("runs") / "run", f"max_staleness={request.param}")


def rollouts(store):
    run = store.load_run()
    for work in open_rounds(store, run):
        for entry in store.entries(work.area, "rollout").values():
            yield work, store.read(entry).to_pylist()


def test_every_row_tells_the_policy_that_wrote_it_and_how_far_it_is_behind(overlapped):
    staleness, store = overlapped
    for work, rows in rollouts(store):
        asked = max(0, work.number - staleness)
        assert {(row["policy_version"], row["policy_lag"]) for row in rows} == {(asked, work.number - asked)}


def test_every_round_is_trained_and_its_lag_is_in_the_metrics(overlapped, capfd):
    staleness, store = overlapped
    assert store.latest_policy() == ROUNDS
    rounds = {row["round"]: row for row in store.metrics() if row["writer"] == "round"}
    assert [rounds[n]["policy_lag"] for n in range(ROUNDS)] == [min(n, staleness) for n in range(ROUNDS)]
    hashes = {store.read_bytes(f"policy/{n:04d}/manifest.json") for n in range(1, ROUNDS + 1)}
    assert len(hashes) == ROUNDS  # the adapter moved every time
    capfd.readouterr()
    status.show(store.uri, False)
    said = capfd.readouterr().out
    assert ("behind" in said) == (staleness > 0)


def test_only_a_lagging_round_is_begun_before_its_forerunner_is_trained(overlapped):
    """By the order in which files came to be: the first rollout of round n against policy n."""
    staleness, store = overlapped
    begun = [min(p.stat().st_mtime_ns for p in (store.local_root / f"rounds/{n:04d}/rollout").iterdir()) for n in range(ROUNDS)]
    trained = [(store.local_root / f"policy/{n:04d}/manifest.json").stat().st_mtime_ns for n in range(1, ROUNDS + 1)]
    for number in range(1, ROUNDS):
        if staleness == 0:
            assert begun[number] > trained[number - 1]
        else:
            assert begun[number] < trained[number - 1]
            assert number == 1 or begun[number] > trained[number - 2]


def test_training_again_on_the_stored_traces_gives_the_same_policy(overlapped, trained_here, capfd):
    _, store = overlapped
    before = store.read_json("policy/0004/manifest.json")
    train.train_committed(store.uri, 3, [], None, False, train.Target(replace=True))
    assert store.read_json("policy/0004/manifest.json") == before


def test_rounds_that_lag_more_than_the_run_allows_are_not_trained_on(overlapped, capfd):
    staleness, store = overlapped
    if staleness == 0:
        pytest.skip("nothing lags")
    document, run = store.read_json("run.json"), store.load_run()
    store.save_run(run.model_copy(update={"max_staleness": 0}), document["versions"])
    with pytest.raises(SystemExit):
        train.train_committed(store.uri, 3, [], None, False, train.Target(replace=True))
    assert "rounds/0003: was rolled out by policy 2, more than max_staleness 0 behind" in "".join(capfd.readouterr())
    assert store.latest_policy() == ROUNDS


@pytest.fixture
def copied(overlapped, tmp_path):
    """A copy of a finished run whose rounds do not overlap, to be changed."""
    staleness, store = overlapped
    if staleness:
        pytest.skip("the order of rounds does not matter here")
    return Store(str(shutil.copytree(store.uri, tmp_path / "run")))


def without_its_last_policy(store):
    for kind in ("policy", "train"):
        store.delete(f"{kind}/{ROUNDS:04d}")
    return store


def test_figures_that_a_killed_driver_did_not_write_are_added_where_nothing_else_is_left(copied, capfd):
    """Without evaluations nothing remains after the last policy: its round had no figures for good."""
    [before] = [row for row in copied.metrics(ROUNDS - 1) if row["writer"] == "round"]
    copied.delete_metrics("round", ROUNDS - 1)
    distill.distill(copied.uri, Choices(), engine_class=FakeEngine)
    assert "Nothing to do" in capfd.readouterr().out
    [after] = [row for row in copied.metrics(ROUNDS - 1) if row["writer"] == "round"]
    assert after == {name: value for name, value in before.items() if not name.startswith(("seconds", "tokens_measured"))}


def test_problems_are_those_of_the_settings_that_another_command_left_before_the_lease_was_had(copied, trained_here, monkeypatch):
    """They were those of the settings that were read before, and stored as those of the new ones."""
    store, hold = without_its_last_policy(copied), distill.hold

    def hold_after_another_command(*arguments):
        store.save_run(resolve(store.load_run(), ["source.split=test"]), versions())
        return hold(*arguments)

    monkeypatch.setattr(distill, "hold", hold_after_another_command)
    distill.distill(store.uri, Choices(), engine_class=FakeEngine)
    source = store.load_run().source
    assert (source.split, store.latest_policy()) == ("test", ROUNDS)
    now = open_source(source).fingerprint
    assert (read_plan(store, "rounds", ROUNDS - 1).source, read_sources(store)["source"].fingerprint) == (now, now)


def test_another_model_makes_a_round_anew_that_is_not_finished_and_no_other(copied, trained_here, capfd):
    """A round of two models was trained on: traces of the old one, scored by the new one."""

    class Other(FakeEngine):
        """An engine of another model: it draws other tokens."""

        def generate(self, requests, policy, sampling):
            return super().generate([replace(request, seed=request.seed + 1) for request in requests], policy, sampling)

    store = without_its_last_policy(copied)
    store.delete(f"rounds/{ROUNDS - 1:04d}/score/0001.json")
    run = store.load_run()
    now = contents.look(run)["model.path"]
    contents.keep(store, run, {"model.path": now.model_copy(update={"weights": {"model.safetensors": "a" * 64}})})
    before = [store.entries(work.area, "rollout") for work in open_rounds(store, run)]
    distill.distill(store.uri, Choices(accept_changes=True), engine_class=Other)
    after = [store.entries(work.area, "rollout") for work in open_rounds(store, run)]
    assert after[:-1] == before[:-1]
    assert all(after[-1][shard].sha256 != entry.sha256 for shard, entry in before[-1].items())
    assert f"rounds/{ROUNDS - 1:04d} is not finished. What another model made of it is made anew" in capfd.readouterr().out
    assert store.latest_policy() == ROUNDS
