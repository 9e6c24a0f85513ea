"""Settings: messages that name the field and the remedy, digests per section."""

from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import LATER, Label, Run
from pipeline.errors import SettingError
from pipeline.overrides import decides, resolve

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
        ("train.betas=[0.9, 2.0]", "less than 1"),
        ("train.keep_checkpoints=1", "greater than or equal to 2"),
        ("evaluation.max_new_tokens=4096", "evaluation.max_new_tokens 4096 leaves no room"),
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
