"""The driver with a fake pool and a fake trainer, handed in through the same door as the real ones."""

import shutil

import numpy as np
import pytest
from in_process import Refusing, bring_up_to_date

from actors.fakes import FakeEngine
from pipeline.contract import Failure, Score
from pipeline.driver import Driver, open_sources
from pipeline.errors import EngineError, SettingError, SourceError, StoreError, TrainingError, UserError
from pipeline.inspection.remaining import Remaining
from pipeline.live.lease import Lease
from pipeline.overrides import resolve
from pipeline.recipes import demo
from pipeline.rounds.metrics import is_timed, summarise_round
from pipeline.rounds.round import open_round, open_rounds
from pipeline.stages import STAGES
from pipeline.store.directory import Store
from pipeline.store.folders import NEEDED

SETS = [
    "rounds=2",
    "rollout.prompts_per_round=4",
    "rollout.prompts_per_shard=2",
    "rollout.group_size=2",
    "evaluation.problems=0",
]


class Trainer:
    """Publishes a policy for each committed round when it is looked at; ends, or fails, after `last` rounds."""

    def __init__(self, store, folder, last=2, error=None):
        self.store, self.folder, self.last, self.error, self.stopped = store, folder, last, error, []

    def running(self):
        latest = self.store.latest_policy()
        if latest < self.last and self.store.ready(latest) is not None:
            self.store.publish_policy(latest + 1, self.folder)
        return self.store.latest_policy() < self.last

    def join(self):
        if self.error is not None:
            raise self.error

    def stop(self, timeout):
        self.stopped.append(timeout)
        return True


class Screen:
    """Keeps what it is told."""

    def __init__(self):
        self.said, self.bars = [], {}

    def say(self, text):
        self.said.append(text)

    def bar(self, title, total, done=0):
        self.bars[title] = [done, total]

        def step(note=""):
            self.bars[title][0] += 1

        return step


def made(folder, *sets, engine=FakeEngine, **options):
    """(driver, its trainer) of a run in a folder; `options` are the trainer's."""
    store, run = Store(str(folder / "run")), resolve(demo(), [*SETS, *sets])
    store.save_run(run, {})
    adapter = folder / "adapter"
    adapter.mkdir(exist_ok=True)
    for name in NEEDED["policy"]:
        (adapter / name).write_bytes(b"weights")
    trainer = Trainer(store, adapter, **options)
    pool = engine(run.model, run.engines.rollout, run.score)
    return Driver(store, run, open_sources(run), {"rollout": pool, "score": pool}, lambda *_: trainer, Screen()), trainer


def brought_to_end(driver):
    driver.bring_to_end(Remaining.of(driver.store, driver.run), Lease(driver.store, "token"))


@pytest.fixture(scope="module")
def finished(ray_local, tmp_path_factory):
    """(driver, its trainer) of a run that was brought to its end."""
    driver, trainer = made(tmp_path_factory.mktemp("runs"), "evaluation.problems=4")
    brought_to_end(driver)
    return driver, trainer


def test_a_run_is_brought_to_its_end(finished):
    driver, trainer = finished
    assert Remaining.of(driver.store, driver.run).is_empty
    assert [work.policy_version for work in open_rounds(driver.store, driver.run)] == [0, 1]
    assert driver.screen.bars == {"evaluate policy 0: steps": [3, 3], "rounds": [2, 2], "evaluate policy 2: steps": [3, 3]}
    first, warning, *answers, silent, again, last = driver.screen.said
    assert warning.startswith("warning: 0 of 4 answers of policy 0 are right.")
    assert [answer.strip().partition(":")[0] for answer in answers] == ["unparsable"] * 2
    assert [silent.split(".")[0], again.split(".")[0]] == ["round 0: no signal", "no signal in rounds 0 to 1"]
    assert [first.partition(" of")[0], last.partition(" of")[0]] == ["policy 0: 0.0 %", "policy 2: 0.0 %"]
    rows = [row for row in driver.store.metrics() if row["writer"] == "round"]
    assert [(row["round"], row["num_rows"], row["seconds_engines"]) for row in rows] == [(0, 8, 0.0), (1, 8, 0.0)]
    assert len(trainer.stopped) == 1


class Flat(FakeEngine):
    """A teacher that gives every token the same log-prob."""

    def score(self, sequences, policy):
        return [Score(s.tokens, np.full_like(s.logprobs, -2.5), s.entropy, 0.0) for s in super().score(sequences, policy)]


@pytest.mark.parametrize("prompt", ["plain", "sibling"])
def test_a_broken_teacher_is_found_before_an_evaluation_or_a_rollout_is_paid(tmp_path, prompt):
    teacher = [f"teachers.big.prompt={prompt}", "teachers.big.dtype=bfloat16", "teachers.big.sample=0"]
    driver, trainer = made(tmp_path, "evaluation.problems=4", *teacher, engine=Refusing)
    own = Flat(driver.run.model, driver.run.engines.rollout, driver.run.score)
    driver.engines = driver.engines | {"teachers.big": own}
    with pytest.raises(EngineError, match=r"teachers\.big: its log-prob is constant: -2\.5 nat"):
        brought_to_end(driver)
    assert len(trainer.stopped) == 1


def test_metrics_that_a_dead_driver_did_not_write_are_added(finished):
    driver, trainer = finished
    [whole] = [row for row in driver.store.metrics() if row["round"] == 1]
    driver.store.delete("metrics/0001-round.jsonl")
    brought_to_end(driver)
    [added] = [row for row in driver.store.metrics() if row["round"] == 1]
    assert added == {name: value for name, value in whole.items() if not name.startswith(("seconds", "tokens"))}
    assert len(trainer.stopped) == 1  # nothing was to be trained: none was started


def test_figures_are_those_of_labels_that_are_made_anew(finished, tmp_path):
    """The table at the end gave regimes as a mean over two definitions, where settings of profiles had changed."""
    driver, _ = finished
    store = Store(str(shutil.copytree(driver.store.uri, tmp_path / "run")))
    run = resolve(driver.run, ["profile.tau_high=0.3", "profile.tau_low=0.2"])
    rows = lambda: {row["round"]: row for row in store.metrics() if row["writer"] == "round"}  # noqa: E731
    before = rows()
    remaining = Remaining.of(store, run)
    assert (remaining.train, remaining.label) == ([], [0, 1])
    Driver(store, run, driver.sources, {}, driver.start_trainer, Screen()).bring_to_end(remaining, Lease(store, "token"))
    for number, row in rows().items():
        shown = summarise_round(open_round(store, run, "rounds", number))
        assert {name: row[name] for name in shown} == shown
        assert row["share_fork"] != before[number]["share_fork"]
        assert row.get("seconds_round") == before[number].get("seconds_round")


def test_a_trainer_that_ends_early_is_told_and_a_later_one_does_not_meet_its_commits(ray_local, tmp_path):
    driver, trainer = made(tmp_path, last=1)
    with pytest.raises(TrainingError, match="ended before it published policy 2"):
        brought_to_end(driver)
    assert len(trainer.stopped) == 1
    driver, _ = made(tmp_path, last=1, error=StoreError("a rank found a damaged shard"))
    with pytest.raises(StoreError, match="a rank found a damaged shard"):
        brought_to_end(driver)
    driver.store.write_json("rounds/0001/ready.json", {"policy": 1, "shards": {"of an earlier start": {}}})
    driver, trainer = made(tmp_path)
    met = []
    driver.start_trainer = lambda *_: met.append(driver.store.ready(1)) or trainer
    brought_to_end(driver)
    assert met == [None]
    assert Remaining.of(driver.store, driver.run).is_empty


def test_figures_of_rounds_that_are_measured_anew_do_not_outlive_a_driver_that_dies(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.driver.execute", in_turn)
    driver, _ = made(tmp_path, last=1)
    for number in range(2):
        driver.store.write_metrics("round", number, [{"round": number, "num_rows": 99}])  # of traces from before
    with pytest.raises(TrainingError, match="ended before it published policy 2"):
        brought_to_end(driver)
    assert {row["num_rows"] for row in driver.store.metrics() if row["writer"] == "round"} == {8}


def test_the_time_of_a_round_tells_no_rate_where_shards_were_there_before(tmp_path, monkeypatch):
    """A shared or resumed round had 100 000 tokens a second: tokens of all shards in the time of a look at them."""
    monkeypatch.setattr("pipeline.driver.execute", in_turn)
    driver, _ = made(tmp_path)
    brought_to_end(driver)
    store = driver.store
    whole = [row for row in store.metrics() if row["writer"] == "round"]
    tokens = [sum(entry.tokens for entry in store.entries(f"rounds/000{n}", "rollout").values()) for n in (0, 1)]
    assert [row["tokens_measured"] for row in whole] == tokens
    assert all(map(is_timed, whole))
    for name in ("policy/0001", "policy/0002", "rounds/0001/rollout/0001.json"):
        store.delete(name)
    brought_to_end(made(tmp_path)[0])
    again = [row for row in store.metrics() if row["writer"] == "round"]
    assert [row["tokens_measured"] for row in again] == [0.0, 0.0]
    assert "seconds_stage_rollout" not in again[0]
    assert not any(map(is_timed, again))


def test_a_driver_that_lost_its_run_ends_and_leaves_the_trainer_to_the_other(tmp_path):
    driver, trainer = made(tmp_path)
    with pytest.raises(StoreError, match="another has taken over this run"):
        driver.bring_to_end(Remaining.of(driver.store, driver.run), Lease(driver.store, "token", stolen_by="another"))
    assert trainer.stopped == []


def test_what_is_wrong_with_the_sources_is_known_before_anything_starts():
    with pytest.raises(SourceError, match=r"^/nowhere\.jsonl: does not exist\. Check source\.uri$"):
        open_sources(resolve(demo(), ["source.uri=/nowhere.jsonl", "model.path=/no/model"]))  # the cheap look comes first
    with pytest.raises(SourceError, match=r"^/nowhere\.jsonl: does not exist\. Check evaluation\.source\.uri$"):
        open_sources(resolve(demo(), ["evaluation.source.uri=/nowhere.jsonl", "model.path=/no/model"]))
    with pytest.raises(SettingError, match=r"score\.keep_topk: 58 is more than the 57 tokens of the teacher's vocabulary"):
        open_sources(resolve(demo(), ["score.keep_topk=58"]))
    with pytest.raises(SettingError, match="answer_pattern"):
        open_sources(resolve(demo(), ["grade.answer_pattern=("]))


def test_sources_of_which_nothing_can_be_asked_are_refused_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match=r"all 4 prompts of the first round are rejected, 4 as prompt_too_long: .*max_model_len"):
        made(tmp_path, "model.max_model_len=80")
    held = tmp_path / "held.jsonl"
    held.write_text("".join(f'{{"problem": "{"1+" * 100}{i}", "solution": "s", "answer": "2"}}\n' for i in range(3)))
    columns = [f"evaluation.source.{name}={name}" for name in ("problem", "solution", "answer")]
    with pytest.raises(UserError, match=r"held\.jsonl: all 3 prompts of the evaluation are rejected, 3 as prompt_too_long: "):
        made(tmp_path, f"evaluation.source.uri={held}", "evaluation.problems=4", *columns)
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"prompt": [{"role": "system", "content": "1+1"}], "solution": "s", "answer": "2"}\n' * 3)
    with pytest.raises(UserError, match=r"column 'prompt' has no user turn"):
        made(tmp_path, f"source.uri={chat}", "source.problem=prompt")


class Failing(FakeEngine):
    """A fake engine that answers no request."""

    def generate(self, requests, policy, sampling):
        return [Failure("it is out of tune") for _ in requests]


def in_turn(work, stages, source=None, on_entry=None, **_):
    """Stages of all shards in this process, without Ray."""
    for name in stages:
        for shard, indices in work.shards.items():
            on_entry(*bring_up_to_date(work, STAGES[name], shard, source.rows(indices) if name == "prompts" else None))


def test_rounds_are_filled_before_the_trainer_takes_them_and_a_resume_plans_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.driver.execute", in_turn)
    sets = (r"grade.answer_pattern=(\d)", "rollout.group_size=8", "rollout.fill_groups=40", "source.sampling=variance")
    driver, _ = made(tmp_path, *sets, "max_staleness=1", "rounds=3", last=3)
    brought_to_end(driver)
    plans = [driver.store.read_json(f"rounds/{n:04d}/plan.json") for n in range(3)]
    for number, plan in enumerate(plans):
        ready = driver.store.ready(number)
        taken = sum(map(len, plan["shards"].values())) - sum(map(len, ready.left_out.values()))
        assert (plan["filling"]["full"], taken, plan["policy"]) == (True, 4, max(0, number - 1))
        assert ready.shards.keys() == plan["shards"].keys()
    assert any(plan["filling"]["further"] for plan in plans)
    [row] = [row for row in driver.store.metrics() if (row["writer"], row["round"]) == ("round", 0)]
    assert row["num_groups_left_out"] == row["num_prompts_further"] == sum(p["prompts"] for p in plans[0]["filling"]["further"])
    before = {n: driver.store.read_bytes(f"rounds/{n:04d}/plan.json") for n in range(3)}
    for version in (2, 3):
        driver.store.delete(f"policy/{version:04d}")
    driver, _ = made(tmp_path, *sets, "max_staleness=1", "rounds=3", last=3)
    brought_to_end(driver)
    assert {n: driver.store.read_bytes(f"rounds/{n:04d}/plan.json") for n in range(3)} == before


def test_a_round_of_rejected_rows_ends_the_run_before_it_is_trained(tmp_path, monkeypatch):
    driver, _ = made(tmp_path, engine=Failing)
    monkeypatch.setattr("pipeline.driver.execute", in_turn)
    with pytest.raises(UserError, match=r"rounds/0000: all 8 rows were rejected, 8 as engine_error: it is out of tune"):
        driver.measure(0)
    assert driver.store.latest_policy() == 0
    assert driver.store.ready(0) is None


class Turns(FakeEngine):
    """A fake pool on a shared card. It looks at the run whenever it is told whose turn it is."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.turns = []

    def look(self):
        return len([number for number in range(9) if self.store.ready(number) is not None]), self.store.latest_policy()

    def sleep(self):
        self.turns.append(("sleep", *self.look()))

    def wake(self):
        self.turns.append(("wake", *self.look()))


def test_a_round_is_committed_when_the_pool_sleeps_and_the_pool_is_woken_when_its_policy_is_there(tmp_path, monkeypatch):
    """The pairs are (rounds that the trainer may take, policies that it has published)."""
    driver, _ = made(tmp_path, "evaluation.problems=2", engine=Turns)
    monkeypatch.setattr("pipeline.driver.execute", in_turn)
    monkeypatch.setattr("pipeline.driver.answer", lambda *_: None)
    pool = driver.engines["rollout"]
    pool.store = driver.store
    brought_to_end(driver)
    assert pool.turns == [
        ("wake", 0, 0),  # for the evaluation of policy 0
        ("wake", 0, 0),
        ("sleep", 0, 0),  # round 0 is committed after it
        ("wake", 1, 1),
        ("sleep", 1, 1),
        ("wake", 2, 2),  # for the last evaluation
    ]
