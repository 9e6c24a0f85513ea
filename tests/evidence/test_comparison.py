"""`egrsd compare` with the fake engine and the real trainer: balanced, resumable, nothing common made twice, honest verdicts."""

import json

import numpy as np
import pytest
import trainer_here

from actors.fakes import UNWATCHED, FakeEngine
from jobs import compare
from jobs.screen import tables
from pipeline.errors import SettingError, UserError
from pipeline.evidence import comparison
from pipeline.overrides import differences, load, resolve
from pipeline.recipes import demo
from pipeline.store.directory import Store

SETS = [
    *UNWATCHED,
    "rounds=2",
    "rollout.prompts_per_round=4",
    "rollout.prompts_per_shard=2",
    "rollout.group_size=4",
    "grade.advantage=running",  # fake traces are never right: a group of zeros would teach nothing
    "train.batch_traces=8",
    "train.warmup_steps=0",
    "evaluation.problems=6",
    "score.keep_topk=16",
]
NAMES = "grpo,cl_egrsd,no_reference,eopd+cl_entropy"
pytestmark = pytest.mark.timeout(900)


def run_it(uri, objectives=NAMES, seeds="0", sets=SETS):
    compare.compare(uri, compare.Options("demo", objectives, seeds, None, sets, None), None, False, FakeEngine)


@pytest.fixture(scope="module")
def compared(ray_local, tmp_path_factory):
    """Four objectives, one seed."""
    store = Store(str(tmp_path_factory.mktemp("compare") / "out"))
    with trainer_here.instead_of_ray_train():
        run_it(store.uri)
    return store


def hashes(store, run, area, stage):
    return {shard: entry.sha256 for shard, entry in Store(store.locate(run)).entries(area, stage).items()}


def test_every_run_is_a_run_and_has_its_point(compared):
    document = compared.read_json("compare.json", "points", "objectives", "pairs", "settings")
    assert [(p["objective"], p["seed"], p["run"]) for p in document["points"]] == [(n, 0, f"{n}-s0") for n in NAMES.split(",")]
    for point in document["points"]:
        assert 0 <= point["accuracy"]["low"] <= point["accuracy"]["value"] <= point["accuracy"]["high"] <= 1
        assert point["length"]["low"] <= point["length"]["value"] <= point["length"]["high"]
        assert Store(compared.locate(point["run"])).latest_policy() == 2
    assert {pair["beyond_noise"] for pair in document["pairs"]} == {None}  # one seed tells nothing of training
    assert document["settings"]["template_hash"]


def test_what_a_seed_shares_is_made_once_and_is_the_same_to_the_byte(compared):
    for area, stages in (("rounds/0000", ("prompts", "rollout", "grade", "score")), ("evals/0000", ("rollout", "grade"))):
        for stage in stages:
            assert hashes(compared, "grpo-s0", area, stage) == hashes(compared, "cl_egrsd-s0", area, stage), (area, stage)
    policies = {Store(compared.locate(f"{n}-s0")).read_bytes("policy/0002/manifest.json") for n in NAMES.split(",")}
    assert len(policies) == 4
    own = Store(compared.locate("cl_egrsd-s0")).entry("rounds/0000", "rollout", "0000")
    first = Store(compared.locate("grpo-s0")).entry("rounds/0000", "rollout", "0000")
    assert own == first  # its seconds too: copied, not made again


def test_a_teacher_without_the_reference_is_scored_anew_under_the_students_prompt(compared):
    store = Store(compared.locate("no_reference-s0"))
    rows = store.read(store.entry("rounds/0000", "prompts", "0000")).to_pylist()
    assert all(row["teacher_prompt_tokens"] == row["prompt_tokens"] for row in rows)
    assert hashes(compared, "no_reference-s0", "rounds/0000", "score") != hashes(compared, "grpo-s0", "rounds/0000", "score")


def test_again_nothing_is_done(compared, monkeypatch, capfd):
    monkeypatch.setattr(compare, "train_one", lambda *_: pytest.fail("trained again"))
    run_it(compared.uri)
    said = capfd.readouterr().out
    assert "0 to do" in said
    assert "untested" in said


def test_the_base_is_kept_with_all_its_settings(compared):
    """A file of settings decided figures, and compare.json named the recipe alone."""
    settings = compared.read_json("compare.json", "settings")["settings"]
    assert settings["recipe"] == "demo"
    assert load(settings["base"]) == resolve(demo(), SETS)


def test_a_command_for_fewer_runs_says_how_the_others_come_back(compared):
    some = compare.chosen(compared, compare.Options("demo", "grpo", "0", None, SETS, None))
    back = f"--objectives {NAMES} --seeds 0 shows them again."
    assert some.unnamed() == f"note: compare.json has 3 more runs, which this command leaves out of it. {back}"
    assert compare.chosen(compared, compare.Options("demo", f"rlsd,{NAMES}", "0,1", None, SETS, None)).unnamed() is None
    assert compare.chosen(Store(f"{compared.uri}/none"), compare.Options("demo", "grpo", "0", None, SETS, None)).unnamed() is None


def test_what_is_done_is_in_the_file_before_more_is_trained(compared, monkeypatch):
    """A command that was killed in its first run left the points of the runs before that one alone."""
    known = {point["run"] for point in compared.read_json("compare.json", "points")["points"]}

    def killed(*_):
        raise UserError("killed here")

    monkeypatch.setattr(compare, "train_one", killed)
    with pytest.raises(SystemExit):
        run_it(compared.uri, f"grpo,rlsd,{NAMES}")
    assert {point["run"] for point in compared.read_json("compare.json", "points")["points"]} == known


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "1+1+1+1", "answer": "4"}], "1 problem is too few for an interval over problems"),
        ([{"problem": "1+1+1+1", "answer": ""}] * 6, "6 as missing_answer: column 'answer' is empty"),
    ],
)
def test_problems_that_tell_nothing_are_refused_before_anything_is_trained(tmp_path, rows, message, capfd):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [*SETS, f"evaluation.source.uri={path}", "evaluation.source.solution=''"]
    with pytest.raises(SystemExit) as ended:
        run_it(str(tmp_path / "out"), sets=sets)
    assert ended.value.code == 2
    said = " ".join("".join(capfd.readouterr()).split())
    assert message in said
    assert "held_out.jsonl" in said


def test_other_settings_are_refused(compared, capfd):
    with pytest.raises(SystemExit) as ended:
        run_it(compared.uri, sets=[*SETS, "train.learning_rate=0.1"])
    assert ended.value.code == 2
    assert "train.learning_rate was 0.001, now 0.1" in "".join(capfd.readouterr())


def test_controls_change_one_thing():
    base = demo()
    for name, changed in {
        "shuffled": {"objective.control"},
        "uniform": {"objective.control"},
        "inverted": {"objective.control"},
        "student_entropy": {"objective.entropy"},
        "no_reference": {"prompts.teacher"},
    }.items():
        assert {setting for setting, _, _ in differences(base, comparison.variant(base, name, base.seed))} == changed, name
    with pytest.raises(SettingError, match="'grpo' has no gate"):
        comparison.variant(resolve(base, ["objective.name=grpo"]), "shuffled", 0)


def test_an_objective_may_have_another_gate_and_a_control():
    base = resolve(demo(), ["score.keep_topk=16"])
    names = comparison.chosen_objectives("grpo,fkl+cl_entropy,opd+top_entropy:0.2+inverted,grpo")
    assert names == ["grpo", "fkl+cl_entropy", "opd+top_entropy:0.2+inverted"]
    found = [comparison.variant(base, name, 3).objective for name in names]
    assert [(o.name, o.gate_kind, o.control) for o in found] == [
        ("grpo", "off", "none"),
        ("fkl", "cl_entropy", "none"),
        ("opd", "top_entropy", "inverted"),
    ]
    assert comparison.Key(names[2], 3).name == "opd+top_entropy0.2+inverted-s3"
    own = comparison.variant(base, "cl_egrsd+cl_entropy+shuffled", 0)
    assert own.objective == comparison.variant(base, "shuffled", 0).objective


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grpo+entropie", r"'grpo\+entropie' has no such gate or control.*Gates: off, entropy"),
        ("grpo+shuffled", "has no such gate or control"),
        ("grpo+entropy+shuffled+x", "has no such gate or control"),
        ("shuffled+entropy", "unknown objective 'shuffled'"),
    ],
)
def test_a_gate_that_is_not_there_is_told(text, message):
    with pytest.raises(SettingError, match=message):
        comparison.chosen_objectives(text)


def test_a_gate_of_the_recipe_that_an_objective_would_drop_is_refused():
    base = resolve(demo(), ["objective.name=grpo", "objective.gate=entropy"])
    with pytest.raises(SettingError, match=r"'opd' of --objectives is compared with its own gate.* Write it as opd\+entropy"):
        comparison.refuse_lost_gate(base, ["shuffled", "opd"])
    comparison.refuse_lost_gate(base, ["shuffled", "opd+entropy"])


@pytest.mark.parametrize(
    ("baseline", "problems", "message"), [("rlsd", 6, "'rlsd' is not compared"), ("grpo", 1, "1 problems are too few")]
)
def test_what_cannot_be_compared_is_refused(tmp_path, baseline, problems, message):
    base = resolve(demo(), [f"evaluation.problems={problems}"])
    with pytest.raises(SettingError, match=message):
        comparison.Comparison.of(Store(str(tmp_path)), base, ["grpo", "cl_egrsd"], [0], baseline)


def test_runs_go_seed_by_seed(tmp_path):
    found = comparison.Comparison.of(Store(str(tmp_path)), demo(), ["grpo", "cl_egrsd"], [3, 0], "grpo")
    assert [key.name for key in found.runs] == ["grpo-s3", "cl_egrsd-s3", "grpo-s0", "cl_egrsd-s0"]
    assert (found.objectives, found.seeds) == (["grpo", "cl_egrsd"], [3, 0])


def series(shift, noise, seeds=5, size=200):
    """Runs whose accuracy by problem is that of the baseline plus a shift."""
    rng = np.random.default_rng(1)
    common, found = rng.random((seeds, size)), comparison.Series()
    for seed in range(seeds):
        found.points[seed] = {}
        found.accuracy[seed] = common[seed] + shift + np.random.default_rng((2, seed)).normal(0, noise, size)
        found.length[seed] = common[seed]
    return found


def test_verdicts_tell_a_shift_from_noise():
    found = {"grpo": series(0, 0), "better": series(0.1, 0.05), "same": series(0, 0.05)}
    told = {(p["objective"], p["measure"]): p for p in comparison.pairs(found, "grpo")}
    assert told["better", "accuracy"]["beyond_noise"] is True
    assert told["same", "accuracy"]["beyond_noise"] is False
    assert told["better", "length"]["beyond_noise"] is False
    assert told["better", "accuracy"]["p_holm"] >= told["better", "accuracy"]["p"]
    assert tables.verdict(told["same", "accuracy"]).startswith("not beyond noise")


def test_a_control_that_would_change_two_things_is_refused_before_anything_is_trained():
    base = resolve(demo(), ["objective.name=eopd", "objective.gate=entropy", "score.keep_topk=16"])
    with pytest.raises(SettingError, match=r"objective\.entropy: .*which tokens learn the teacher's distribution"):
        comparison.variant(base, "student_entropy", 0)
