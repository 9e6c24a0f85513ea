"""Which shards exist, which are fresh, and why one is stale. On small rounds of fake engines, without Ray."""

from dataclasses import replace

import pytest
from in_process import SETS, Refusing, brought, planned, stale

from actors.fakes import Behaviour, FakeEngine
from pipeline.config.objective import DISTRIBUTIONAL, OBJECTIVES
from pipeline.contract import Scope
from pipeline.digest import digest
from pipeline.method.rewards import RunningBaseline
from pipeline.overrides import resolve
from pipeline.problems.problem import Problem
from pipeline.problems.sources import open_source
from pipeline.recipes import demo
from pipeline.rounds.inventory import Inventory, commit_round, warning_over
from pipeline.rounds.round import open_round, plan_round, problems_digest, same_problems
from pipeline.stages import LABELS, MEASURE, PLAIN, STAGES
from pipeline.store.directory import Store
from pipeline.store.folders import NEEDED


def test_a_setting_makes_exactly_its_stages_stale(tmp_path):
    brought(planned(tmp_path))
    shards = ("0000", "0001")
    for setting, expected in {
        "label.gamma=1": {("label", s): "settings" for s in shards},
        "train.learning_rate=1": {},
        "grade.beta_length=0": {("grade", s): "settings" for s in shards},
        "profile.window=0": {("profile", s): "settings" for s in shards},
        "label.min_normaliser=2": {(n, s): "settings" for n in LABELS for s in shards},
        "score.keep_topk=4": {("score", s): "settings" for s in shards},
        "rollout.temperature=2": {("rollout", s): "settings" for s in shards},
        "grade.processes=2": {},
    }.items():
        run = resolve(demo(), [*SETS, setting])
        assert stale(open_round(Store(str(tmp_path)), run, "rounds", 0)) == expected, setting


def test_another_objective_makes_nothing_stale_but_scores_that_lack_its_column(tmp_path):
    brought(planned(tmp_path))
    for name in OBJECTIVES:
        more = {"sft": "rollout.teacher_share=0.5"}.get(name, "score.keep_topk=16" if name in DISTRIBUTIONAL else "rounds=2")
        asked = [f"objective.name={name}", "objective.gate=entropy", "objective.control=uniform", "objective.normalise=sequence"]
        run = resolve(demo(), [*SETS, *asked, more])
        stages = {stage for stage, _ in stale(open_round(Store(str(tmp_path)), run, "rounds", 0))}
        assert stages == {"sft": {"rollout"}}.get(name, {"score"} if name in DISTRIBUTIONAL else set()), name


def test_a_recomputed_input_with_the_same_bytes_makes_nothing_stale(tmp_path):
    work = planned(tmp_path)
    brought(work)
    assert brought(work, "rollout", force=True) == [("rollout", "0000"), ("rollout", "0001")]
    assert stale(work) == {}


def test_what_changed_upstream_is_named(tmp_path):
    brought(planned(tmp_path))
    work = planned(tmp_path, "grade.answer_pattern=([0-9])", "grade.verifier=exact", engine=Refusing)  # other answers are right
    texts = brought(work, "grade")
    assert len(texts) == 2
    assert stale(work) == {("label", "0000"): "grade changed", ("label", "0001"): "grade changed"}


def test_the_peak_of_the_round_needs_every_shard(tmp_path):
    work = planned(tmp_path)
    brought(work, *MEASURE)
    peak = Inventory(work).scope[0]
    facts = [e.facts["entropy_max"] for e in work.store.entries(work.area, "score").values()]
    assert peak == max(facts) > 0
    work.store.delete(f"{work.area}/score/0001.json")
    assert Inventory(work).scope is None


def test_bounds_where_exact_entropies_were_asked_for_are_a_warning(tmp_path):
    def fell_back(*args):
        return FakeEngine(*args, behaviour=Behaviour(falls_back=str(tmp_path)))

    work = planned(tmp_path / "run", engine=fell_back)
    assert Inventory(work).warning() is None  # nothing is scored yet
    brought(work, *MEASURE)
    told = Inventory(work).warning()
    assert told.startswith("rounds/0000, 2 of 2 shards: entropies are bounds and not exact (the fake was told so).")
    both = warning_over([Inventory(work)] * 3)
    assert both.startswith("rounds/0000 to rounds/0000, 6 of 6 shards: ")
    assert both.endswith(told.partition(" shards: ")[2])
    asked = planned(tmp_path / "asked", "score.entropy=bounds", engine=fell_back)
    brought(asked, *MEASURE)
    exact = planned(tmp_path / "exact")
    brought(exact, *MEASURE)
    assert Inventory(asked).warning() is Inventory(exact).warning() is None


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_missing_is_told_from_what_lacks_an_input(tmp_path, whole):
    work = planned(tmp_path)
    seen = Inventory(work, whole)
    assert {stage.name: seen.why_stale(stage, "0000") for stage in PLAIN} == dict.fromkeys((s.name for s in PLAIN), "missing")
    assert seen.begun_and_stale("grade") == {}
    brought(work)
    work.store.delete(f"{work.area}/score/0000.json")
    seen = Inventory(work, whole)
    reasons = {stage.name: seen.why_stale(stage, "0000") for stage in PLAIN}
    fresh = dict.fromkeys(("prompts", "rollout", "grade"))
    assert reasons == {**fresh, "score": "missing", "profile": "input missing", "label": "input missing"}
    assert seen.expected_inputs(STAGES["profile"], "0000") is None
    others = {stage.name: seen.why_stale(stage, "0001") for stage in PLAIN}  # these two need the peak of every shard
    assert others == {**fresh, "score": None, "profile": "input missing", "label": "input missing"}


def test_an_inventory_counts_shards_and_a_new_one_sees_what_changed(tmp_path):
    work = planned(tmp_path)
    brought(work, *MEASURE)
    before = Inventory(work)
    assert before.is_whole(*MEASURE)
    assert before.is_fresh(*MEASURE)
    assert not before.is_whole(*LABELS)
    assert before.reasons("label") == {"missing": 2}
    work.store.delete(f"{work.area}/grade/0001.json")
    assert before.is_whole("grade")  # entries are read once
    after = Inventory(work)
    assert not after.is_whole("grade")
    assert after.reasons("grade") == after.begun_and_stale("grade") == {"missing": 1}
    assert after.hashes(["grade"]) == {"0000": {"grade": before.entry("grade", "0000").sha256}, "0001": {}}


def test_other_rows_of_the_source_make_prompts_alone_stale(tmp_path):
    work = planned(tmp_path)
    brought(work)
    seen = Inventory(work)
    assert seen.why_stale(STAGES["prompts"], "0000") is None  # without a digest the rows count as unchanged
    assert seen.why_stale(STAGES["prompts"], "0000", "another digest") == "problems changed"
    assert seen.reasons("prompts", {"0001": "another digest"}) == {"problems changed": 1}
    assert not seen.is_fresh("prompts", problems={"0001": "another digest"})
    assert seen.why_stale(STAGES["rollout"], "0000", "another digest") is None


def published(store, folder, text):
    """Policy 1, of files that hold `text`."""
    folder.mkdir(exist_ok=True)
    for name in NEEDED["policy"]:
        (folder / name).write_text(text)
    store.publish_policy(1, folder)


def test_a_policy_that_was_trained_again_makes_its_answers_stale_and_not_what_only_reads_them(tmp_path):
    published(Store(str(tmp_path / "run")), tmp_path / "adapter", "one")
    work = planned(tmp_path / "run", number=1, policy=1)
    brought(work)
    assert stale(work) == {}
    published(work.store, tmp_path / "adapter", "two")
    shards = ("0000", "0001")
    assert stale(work) == {(name, shard): "policy changed" for name in ("rollout", "score") for shard in shards}
    seen = Inventory(work)
    assert seen.stale_input(STAGES["score"], "0000") == "rollout (policy changed)"
    assert {seen.stale_input(STAGES[name], "0000") for name in ("grade", "profile", "label")} == {None}
    onto_base = Inventory(replace(work, policy_version=0))  # the base has no such input
    assert onto_base.why_stale(STAGES["rollout"], "0000") == "policy changed"


def test_another_running_baseline_or_peak_is_named(tmp_path):
    sets = ("grade.advantage=running", "profile.normaliser=batch_max")
    work = planned(tmp_path, *sets)
    brought(work)
    assert stale(work) == {}
    shards = ("0000", "0001")
    moved = replace(work, baseline=RunningBaseline().update([1.0, 0.0]))
    assert stale(moved) == {("grade", shard): "baseline changed" for shard in shards}
    peak, vocab_size = Inventory(work).scope
    higher = replace(work, scope=Scope(peak + 1, vocab_size))
    assert stale(higher) == {(name, shard): "peak changed" for name in ("profile", "label") for shard in shards}


def test_a_stale_input_is_named_with_its_reason(tmp_path):
    brought(planned(tmp_path))
    seen = Inventory(planned(tmp_path, "profile.window=0"))
    assert seen.stale_input(STAGES["label"], "0000") == "profile (settings)"
    assert seen.stale_input(STAGES["profile"], "0000") is None
    work = planned(tmp_path)
    work.store.delete(f"{work.area}/rollout/0000.json")
    assert Inventory(work).stale_input(STAGES["score"], "0000") == "rollout (missing)"
    assert Inventory(work).stale_input(STAGES["score"], "0001") is None


def test_a_committed_round_whose_shards_changed_is_told(tmp_path):
    work = planned(tmp_path)
    brought(work, *MEASURE)
    assert Inventory(work).as_committed is None
    commit_round(work)
    assert Inventory(work).as_committed is True
    brought(planned(tmp_path, "grade.beta_length=0", "grade.advantage=running"), "grade")
    assert Inventory(work).as_committed is False


def test_an_evaluation_that_lacks_problems_for_a_teachers_prompt_is_made_again(tmp_path):
    """Evaluations of now have these problems, so the base's old one paired with none of them. Others stay fresh."""
    run = resolve(demo(), [*SETS, "model.max_model_len=80"])  # no prompt of the student fits beside 72 new tokens either
    work = plan_round(Store(str(tmp_path)), run, "evals", 0, 0, open_source(run.source))
    brought(work, "prompts")
    entries = {shard: work.store.entry(work.area, "prompts", shard) for shard in work.shards}
    assert entries["0000"].facts["untaught"]
    assert entries["0000"].rejected["prompt_too_long"] > 0
    assert stale(work) == {key: why for key, why in stale(work).items() if key[0] != "prompts"}
    for rejected, reason in (({}, None), ({"prompt_too_long": 1}, "settings")):
        seen = Inventory(work)
        seen._stages["prompts"] = entries | {"0000": replace(entries["0000"], facts={}, rejected=rejected)}
        assert [seen.why_stale(STAGES["prompts"], shard) for shard in ("0000", "0001")] == [reason, None]


def test_a_changed_other_column_makes_prompts_stale_and_shards_of_early_versions_stay_fresh(tmp_path):
    def row(level):
        return [Problem(0, "1+1", "s", "2", extra=level)]

    plain, three, four = (problems_digest(row(level)) for level in (None, '{"level": 3}', '{"level": 4}'))
    early = digest([{"index": 0, "problem": "1+1", "solution": "s", "answer": "2", "reject": None, "detail": ""}])
    assert plain == early
    assert three.startswith(f"{plain}+")
    assert not same_problems(three, four)
    assert same_problems(early, three)
    assert not same_problems(three, plain)
    assert problems_digest([replace(row(None)[0], messages="[]")]) not in (plain, early)
    assert not same_problems(None, three)


def test_imported_traces_do_not_depend_on_the_policy(tmp_path):
    run = resolve(demo(), ["source.uri=x.jsonl", "source.response=t"])
    assert STAGES["rollout"].round_inputs(run) == ()
    assert not STAGES["rollout"].asks(run)
    assert run.digest(STAGES["rollout"].settings) != demo().digest(STAGES["rollout"].settings)
