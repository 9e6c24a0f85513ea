"""Every setting is explained, by its own name, its last part or its section, and the explanation is what the code does."""

import pytest

from pipeline.config import Run
from pipeline.errors import SettingError
from pipeline.inspection.explained import explain, made_stale, settings
from pipeline.overrides import resolve
from pipeline.recipes import demo
from pipeline.stages import PLAN


def test_every_setting_has_one_line_a_type_and_what_it_makes_stale():
    for name, one in settings().items():
        assert one.meaning, f"{name} has no description (pipeline/config)"
        assert "\n" not in one.meaning
        assert one.kind, name
        assert one.stale, name


def test_every_setting_of_a_run_is_there():
    def leaves(data, before=""):
        for key, value in data.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{before}{key}.")
            else:
                yield f"{before}{key}"

    assert set(leaves(Run(name="x").model_dump(mode="json"))) <= settings().keys()


@pytest.mark.parametrize(
    ("name", "kind", "default", "stale"),
    [
        ("rollout.temperature", "number, above 0, at most 2", "1", "rollout and what follows"),
        ("label.gamma", "number, at least 0", "0.3", "label"),
        ("train.learning_rate", "number, above 0", "0.001", "no stage; policies stay as they are until you run `egrsd train`"),
        ("engines.rollout.max", "whole number, at least 1", "1", "nothing"),
        ("evaluation.source.split", "text", "test", "evaluations"),
        ("model.revision", "text or null", "null", "prompts, rollout, score and what follows"),
        ("source.pass_rate", "list of 2: number", "0,1", "nothing; later rounds are planned with it"),
    ],
)
def test_a_setting_is_explained(name, kind, default, stale):
    [one] = explain(name)
    assert (one.kind, one.default, one.stale) == (kind, default, stale)


def test_the_gate_of_labels_and_that_of_training_are_told_apart():
    assert explain("label.gamma")[0].meaning.endswith("Stored labels and report read it; training reads objective.gamma")
    assert explain("objective.gamma")[0].meaning.endswith("Training reads it")
    run = Run(name="x")
    assert run.label.differs_from(run.objective, run.profile.window) == ""
    changed = run.label.model_copy(update={"gamma": 1.0, "floor": 0.2})
    assert "label.gamma 1 (training: 0.3), label.floor 0.2 (training: 0.1)" in changed.differs_from(
        run.objective, run.profile.window
    )


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["objective.window=5"], "a lookahead of 3 tokens (training: 5)"),
        (["objective.name=egrsd"], "a lookahead of 3 tokens (training: 0)"),
        (["objective.name=egrsd", "label.lookahead=false"], ""),
        (["profile.window=0"], "a lookahead of 0 tokens (training: 3)"),
        (["objective.name=rlsd", "profile.window=1"], "advantage x magnitude x gate (training: objective rlsd)"),
        (
            ["objective.name=grpo", "label.gamma=1"],
            "use: advantage x magnitude x gate (training: objective grpo). Training goes by",
        ),
        (["objective.name=opd", "objective.gate=entropy"], "advantage x magnitude x gate (training: objective opd)"),
        (["objective.control=inverted"], "the gate as it is (training: inverted)"),
        (["objective.entropy=student"], "the teacher's entropy (training: the student's)"),
        (["objective.gate=top_entropy:0.2"], "use: a gate on the entropy (training: top_entropy:0.2). Training"),
        (["objective.gate=off", "label.gamma=1"], "use: a gate on the entropy (training: off). Training"),
    ],
)
def test_labels_that_weigh_otherwise_than_training_are_told(sets, told):
    run = resolve(demo(), sets)
    found = run.label.differs_from(run.objective, run.profile.window)
    assert (told in found) if told else found == ""


def test_the_stages_that_are_named_are_those_whose_shards_a_change_makes_stale():
    run = Run(name="x")
    changed = run.model_copy(update={"rollout": run.rollout.model_copy(update={"temperature": 0.5})})
    stale = [stage.name for stage in PLAN if run.digest(stage.settings) != changed.digest(stage.settings)]
    assert stale == ["rollout"]
    assert explain("rollout.temperature")[0].stale.startswith("rollout")


def test_a_section_lists_its_settings_and_names_of_teachers_are_free():
    assert [one.name for one in explain("label")] == [
        f"label.{n}" for n in ("gamma", "floor", "epsilon", "min_normaliser", "lookahead")
    ]
    assert explain("teachers.big.prompt")[0].name == "teachers.NAME.prompt"
    assert explain("grade.rewards.steps.weight")[0].stale.startswith("grade")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("temperature", "'rollout.temperature' or 'evaluation.temperature'"),
        ("label.gama", "'label.gamma'"),
        ("zzz", "`egrsd explain`"),
    ],
)
def test_an_unknown_setting_suggests_the_nearest(name, hint):
    with pytest.raises(SettingError, match="unknown setting") as refused:
        explain(name)
    assert hint in refused.value.remedy


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rollout.temperature", "rollout and what follows"),
        ("train.learning_rate", "no stage; policies stay as they are until you run `egrsd train`"),
        ("grade.rewards.steps.weight", "grade and what follows"),
        ("teachers.big.served_model", "score and what follows"),
        ("engines.rollout.options.seed", "nothing"),
    ],
)
def test_a_change_of_a_run_is_told_by_what_it_makes_stale(name, said):
    """A changed learning rate was accepted with "What depends on it is made anew", and policies stay as they are."""
    assert made_stale(name) == said
