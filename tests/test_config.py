"""Settings: messages that name the field and the remedy, digests per section."""

from typing import Annotated, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import contract
from pipeline.config import LATER, Evaluation, Label, Objective, Run
from pipeline.config.objective import OBJECTIVES, TOPK, readers, unread
from pipeline.errors import SettingError
from pipeline.overrides import decides, refuse_unread_objective, resolve

BASE = Run(name="t")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.group_size=0", "rollout.group_size: .*greater than or equal to 1"),
        ("rollout.group_size=1", "grade.advantage 'group' needs rollout.group_size"),
        ("rollout.max_new_tokens=4096", "raise the window or lower the cap"),
        ("profile.tau_low=0.5", "tau_low 0.5 must be below tau_high"),
        ("engines.rollout.min=3", "min 3 is above max 1"),
        ("engines.rollout.tensor_parallel=2", "tensor_parallel 2 needs placement.gpus 2, one for each process; it is 0"),
        ("objective.name=ppo", "objective.name: .*'grpo'"),
        ("train.learning_rate=.inf", "finite number"),
        ("objective.position_tau=.nan", "finite number"),
        ("seed=100000000000000000000", "seed: "),
        ("rounds=10000000000", "rounds: "),
        ("rollout.prompts_per_round=1e30", "rollout.prompts_per_round: .*less than or equal to 10000000 "),
        ("rollout.group_size=1e12", "rollout.group_size: .*less than or equal to 100000 "),
        ("evaluation.samples=1e15", "evaluation.samples: .*less than or equal to 100000 "),
        ("train.warmup_steps=1e13", r"train.warmup_steps: is larger than 1e\+12, the most that a setting may be"),
        ("objective.kl=1e300", r"objective.kl: is larger than 1e\+12"),
        ("stall_timeout_s=1e10", r"stall_timeout_s: is larger than 1e\+09"),
        ("engines.rollout.grow_after_s=1e10", r"engines.rollout.grow_after_s: is larger than 1e\+09"),
        ("train.betas=[0.9, 2.0]", "less than 1"),
        ("train.keep_checkpoints=1", "greater than or equal to 2"),
        ("evaluation.max_new_tokens=4096", "evaluation.max_new_tokens 4096 leaves no room"),
        ("teachers.big.modl=x", "teachers.big.modl: unknown setting. Did you mean 'teachers.big.model'"),
        ("teachers.Big.model=x", "'Big' is no name of a teacher"),
        ("teachers.score.model=x", "'score' is no name of a teacher"),
        ("teachers.a.policy=lag", "teachers.a.policy: 'lag' is no policy: write base, lag:N"),
        ("teachers.a.policy=ema:1", "'ema:1' is no policy"),
        ("teachers.a.template=No field", "teachers.a.template lacks {problem}"),
        ("teachers.a={prompt: feedback, template: '{problem}'}", "teachers.a.template lacks {feedback}"),
        ("teachers.a.template={problem} {reference}", "teachers.a.template lacks {solution} or {answer}"),
        (r"teachers.a.template={problem} \boxed{answer}", "teachers.a.template lacks {solution} or {answer}"),
        (
            "teachers.a={prompt: plain, template: '{problem} {answer}'}",
            "a plain teacher does not see: set teachers.a",
        ),
        ("teachers.a.server=http://key@host:1", "a token stands in the environment, never in the address"),
        ("teachers.a.server=http://host:1", "server needs model"),
        ("teachers.a.revision=main", "revision is that of model, which is empty"),
        ("teachers.a={model: x, policy: 'lag:1'}", "a policy of the student: leave model and server empty"),
        ("teachers={a: {}, b: {}}", "source.teacher must name the column that chooses one"),
        ("source.teacher=who", "`teachers` has none"),
    ],
)
def test_a_wrong_setting_is_named_with_what_to_do(override, message):
    with pytest.raises(SettingError, match=message):
        resolve(BASE, [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["max_staleness=1"], "max_staleness 1 lets rollout and training run at one time, .* set max_staleness 0"),
        (["train.workers=2"], r"train\.workers 2: with engines\.rollout\.colocate one rank trains: set workers 1"),
        (["engines.rollout.max=2"], r"colocate is for one engine beside the trainer: set max 1 \(it is 2\)"),
        (["engines.score={}"], "with colocate one engine does all. Leave score out"),
        (["engines.rollout.colocate=false", "train.offload=all"], r"train\.offload 'all' is for a GPU that an engine shares"),
    ],
)
def test_what_does_not_go_with_one_card_is_refused_in_one_line(overrides, message):
    with pytest.raises(SettingError, match=message) as refused:
        resolve(BASE, ["engines.rollout.colocate=true", *overrides])
    assert "\n" not in str(refused.value)


# ---- the objective


def meant(**section):
    """(gate, control) of an objective section."""
    found = Objective.model_validate(section)
    return found.gate_kind, found.control


EARLIER = {"rlsd_lam": 0.5, "position_min": 0.25}  # a section of earlier versions lists all its settings, and has no `control`


@pytest.mark.parametrize("name", ["grpo", "rlsd", "position", "egrsd", "cl_egrsd"])
def test_a_gate_of_earlier_versions_is_read_as_what_it_meant(name):
    own = {"egrsd": "entropy", "cl_egrsd": "cl_entropy"}.get(name, "off")
    assert meant(name=name, gate="entropy", **EARLIER) == (own, "none")
    assert resolve(BASE, [], {"objective": {"name": name, "gate": "entropy", **EARLIER}}).objective.gate == "own"
    if own != "off":
        for control in ("shuffled", "uniform", "inverted"):
            assert meant(name=name, gate=control, **EARLIER) == meant(name=name, gate=control) == (own, control)
            changed = resolve(BASE, [f"objective.gate={control}", f"objective.name={name}"])
            assert (changed.objective.gate, changed.objective.control) == ("own", control)


def test_a_gate_that_is_the_objectives_own_is_no_change():
    assert resolve(BASE, ["objective.gate=entropy"]) == resolve(BASE, ["objective.gate=cl_entropy"]) == BASE
    assert resolve(BASE, ["objective.name=egrsd", "objective.gate=entropy"]) == resolve(BASE, ["objective.name=egrsd"])
    assert resolve(BASE, ["objective.name=grpo", "objective.gate=off"]) == resolve(BASE, ["objective.name=grpo"])
    for name, gate in (("grpo", "entropy"), ("egrsd", "cl_entropy"), ("cl_egrsd", "off"), ("opd", "top_entropy:0.2")):
        found = resolve(BASE, [f"objective.name={name}", f"objective.gate={gate}"]).objective
        assert (found.gate, found.gate_kind) == (gate, gate.partition(":")[0])


@pytest.mark.parametrize(
    "gate", ["top_entropy", "top_entropy:0", "top_entropy:1.5", "top_entropy:x", "entropy:0.2", "own:1", "on"]
)
def test_what_is_no_gate_is_told(gate):
    with pytest.raises(SettingError, match=r"objective.gate: .* is no gate: write off, entropy, cl_entropy or top_entropy:SHARE"):
        resolve(BASE, [f"objective.gate={gate}"])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["name=opd", "control=shuffled"], "'opd' has no gate: set objective.gate"),
        (["name=opd", "entropy=student"], "'opd' has no gate"),
        (["name=opd", "gate=top_entropy:0.2", "entropy=student"], "reads the student's anyway"),
        (
            ["name=fkl"],
            "'fkl' reads some of the teacher's most likely tokens, and score.keep_topk is 0: set score.keep_topk=16; "
            "for stored traces run `egrsd stage score --round N --set score.keep_topk=16`",
        ),
        (["name=gkd", "top_k=32"], "reads 32 of the teacher's most likely tokens.* set score.keep_topk=32"),
        (["kl=0.1"], "egrsd stage score --round N --set score.base_logprobs=true"),
        (["name=sft"], "traces of others: set source.response, or rollout.teacher_share above 0"),
        (["clip=ppo", "correction=token"], "clip and correction would use one ratio twice"),
        (["name=eopd", "correction=token"], "clip and correction would use one ratio twice"),
    ],
)
def test_an_objective_without_what_it_needs_is_refused_with_what_to_do(sets, message):
    with pytest.raises(SettingError, match=message):
        resolve(BASE, [f"objective.{text}" for text in sets])


def test_a_share_that_is_no_trace_brings_no_trace_of_a_teacher():
    """.05 of 8 traces is none: `sft` trained nothing for a whole run."""
    share = "rollout.teacher_share=0.05"
    with pytest.raises(SettingError, match="traces of others"):
        resolve(BASE, [share, "rollout.group_size=8", "objective.name=sft"])
    assert resolve(BASE, [share, "rollout.group_size=8", "objective.gate=top_entropy:0.2"]).writers == ["student"] * 8


def test_eopd_needs_its_sixteen_tokens_and_top_entropy_the_student():
    with pytest.raises(SettingError, match=r"reads 16 of the teacher's most likely tokens, and score\.keep_topk is 8"):
        resolve(BASE, ["objective.name=eopd", "score.keep_topk=8"])
    assert resolve(BASE, ["objective.name=eopd", "score.keep_topk=8", "objective.top_k=8"]).objective.ratio_kind == "ppo"
    with pytest.raises(SettingError, match=r"'top_entropy' needs rollout\.teacher_share 0"):
        resolve(BASE, ["objective.gate=top_entropy:0.2", "rollout.teacher_share=0.5"])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["rlsd_lam=0.2"], "objective.rlsd_lam: objective 'cl_egrsd' does not read this setting. It is read by: rlsd"),
        (["name=grpo", "window=2"], "It is read under objective.gate cl_entropy"),
        (["name=egrsd", "window=2"], "It is read under objective.gate cl_entropy"),
        (["clip_low=0.1"], "It is read with objective.clip"),
        (["correction_cap=2"], "It is read with objective.correction"),
        (["name=sft", "clip=ppo"], "It is read by: grpo"),
        (["support=truncated"], "It is read by: fkl, gkd, eopd, opsd"),
    ],
)
def test_a_setting_that_the_objective_does_not_read_is_refused(sets, message):
    overrides = [f"objective.{text}" for text in sets] + ["rollout.teacher_share=0.5"]
    with pytest.raises(SettingError) as caught:
        refuse_unread_objective([resolve(BASE, overrides)], overrides)
    assert message in str(caught.value)


def test_every_setting_of_the_objective_is_read_by_one_and_says_so():
    for setting in Objective.model_fields:
        assert readers(setting)
    many = [Objective.model_construct(name=name) for name in OBJECTIVES]
    many += [Objective(name="grpo", gate="cl_entropy", clip="ppo"), Objective(name="grpo", correction="token")]
    assert unread(many, [f"objective.{name}" for name in Objective.model_fields]) is None
    assert get_args(Objective.model_fields["name"].annotation) == OBJECTIVES
    assert TOPK == contract.TOPK


def test_credentials_in_a_source_are_refused_and_not_repeated():
    with pytest.raises(SettingError, match="holds credentials") as caught:
        resolve(BASE, ["source.uri=s3://key:hunter2@bucket/x.jsonl"])
    assert "hunter2" not in str(caught.value)


def test_training_needs_reference_solutions_and_an_evaluation_does_not():
    assert resolve(BASE, ['evaluation.source.solution=""']).evaluation.source.solution == ""
    with pytest.raises(SettingError, match="the teacher needs reference solutions"):
        resolve(BASE, ['source.solution=""'])


def test_the_students_entropy_is_not_known_where_the_teacher_wrote():
    with pytest.raises(SettingError, match=r"needs rollout\.teacher_share 0"):
        resolve(BASE, ["objective.entropy=student", "rollout.teacher_share=0.5"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.placement.gpus=1.5", "gpus 1.5: more than one GPU must be a whole number"),
        ("engines.rollout.placement.resources={CPU: 1}", "resources holds CPU: use cpus and gpus"),
    ],
)
def test_a_placement_that_ray_would_refuse_is_refused(setting, message):
    with pytest.raises(SettingError, match=message):
        resolve(BASE, [setting])


def test_a_run_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        BASE.rollout.group_size = 3


@given(st.floats(0, 5))
def test_only_the_changed_section_changes_its_digest(gamma):
    other = resolve(BASE, [f"label.gamma={gamma}"])
    assert (other.digest(("label",)) == BASE.digest(("label",))) == (other == BASE)
    assert other.digest(("rollout", "model")) == BASE.digest(("rollout", "model"))


class LaterLabel(Label):
    brightness: Annotated[float, LATER] = 1.0


class LaterRun(Run):
    label: LaterLabel = LaterLabel()


def test_a_setting_that_came_later_counts_only_away_from_its_default():
    """Stages name it alone, or the whole section."""
    before, after = Run(name="t"), LaterRun(name="t")
    moved = after.model_copy(update={"label": LaterLabel(brightness=2.0)})
    assert before.digest(("label", "label.gamma")) == after.digest(("label", "label.gamma", "label.brightness"))
    assert len({run.digest(("label",)) for run in (before, after, moved)}) == 2
    assert after.digest(("label.brightness",)) != moved.digest(("label.brightness",))


def test_a_digest_of_what_is_no_setting_is_refused():
    for name in ("label.gama", "lable", "lable.gamma"):
        with pytest.raises((KeyError, AttributeError)):
            BASE.digest((name,))


def test_a_setting_that_no_result_depends_on_changes_no_digest_and_may_change_in_a_run():
    for value in ("true", "false"):
        assert resolve(BASE, [f"score.fallback={value}"]).digest(("score",)) == BASE.digest(("score",))
    assert resolve(BASE, ["score.top_k=5"]).digest(("score",)) != BASE.digest(("score",))
    assert not decides("score.fallback")
    assert decides("score.top_k")
    assert decides("grade.fallback")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "at temperature 1, top-p 1, top-k off, at most 64 tokens"),
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, "at temperature 0.6, top-p 0.95, top-k 20, at most 64 tokens"),
        ({"top_k": 1, "max_new_tokens": 8}, "greedily, at most 8 tokens"),
    ],
)
def test_the_sampling_of_an_evaluation_is_said_in_words(settings, words):
    assert Evaluation(**settings).sampling == words
