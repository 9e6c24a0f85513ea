"""Settings from outside: overrides over documents over recipes, mistakes that are named, differences of two runs."""

import pytest
import yaml

from pipeline.config import Run
from pipeline.errors import SettingError
from pipeline.overrides import decides, differences, load, resolve, undoing
from pipeline.recipes import demo
from pipeline.stages import PLAN

BASE = Run(name="t")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lable.gamma=1", "lable: unknown setting. Did you mean 'label'"),
        ("label.gama=1", "label.gama: unknown setting. Did you mean 'label.gamma'"),
        ("label.gamma=abc", "label.gamma: .*number"),
        ("gamma", "an override is written"),
        ("label.gamma=[", r"label.gamma: Input should be a valid number \(got '\['\)"),
        ("source.options=[", "source.options: the value is not YAML"),
        ("label=3", "label: holds several settings, not one value. Write --set label.NAME=value"),
        ("label.gamma.x=3", "label.gamma.x: unknown setting. 'label.gamma' is one setting"),
    ],
)
def test_a_wrong_override_is_named_with_what_to_do(override, message):
    with pytest.raises(SettingError, match=message):
        resolve(BASE, [override])


def test_overrides_are_laid_over_the_document_over_the_base():
    run = resolve(BASE, ["train.learning_rate=2e-4"], {"train": {"learning_rate": 1, "workers": 2}})
    assert (run.train.learning_rate, run.train.workers) == (2e-4, 2)
    assert run.rollout == BASE.rollout


def test_free_form_sections_take_new_keys():
    run = resolve(BASE, ["source.options.min_terms=3", "engines.rollout.placement.labels.zone=a"])
    assert run.source.options == {"min_terms": 3}
    assert run.engines.rollout.placement.labels == {"zone": "a"}


def test_an_empty_section_clears_what_was_there():
    run = resolve(BASE, ["source.options.min_terms=3", "source.options={}", "source.options.max_terms=4"])
    assert run.source.options == {"max_terms": 4}
    assert resolve(BASE, ["rollout.group_size=3"], {"rollout": {}}).rollout.group_size == 3
    assert resolve(resolve(BASE, ["rollout.group_size=3"]), [], {"rollout": {}}).rollout.group_size == 3


def test_a_second_pool_appears_when_it_is_set():
    assert resolve(BASE, ["engines.score.max=2"]).engines.score.max == 2


def test_yaml_round_trip():
    assert load(yaml.safe_load(BASE.to_yaml())) == BASE


def test_differences_name_both_values():
    assert differences(BASE, resolve(BASE, ["label.gamma=1.0"])) == [("label.gamma", 0.3, 1.0)]


REWARDS = "grade.rewards=[{name: a, function: x.py, settings: {most: 1}}, {name: b, function: format, settings: {pattern: z}}]"


@pytest.mark.parametrize(
    "sets",
    [
        ["label.gamma=1.0", "label.floor=0.5"],
        ["grade.answer_pattern=# (.+)", "train.threads=2", "score.fallback=false"],
        ["prompts.student=A problem:\n{problem}", "source.uri=true.jsonl"],
    ],
)
def test_undoing_words_bring_every_old_value_back(sets):
    run = resolve(BASE, sets)
    words = undoing(differences(BASE, run))
    assert len(words) == 2 * len(sets)
    assert words[::2] == ["--set"] * len(sets)
    assert resolve(run, words[1::2]) == BASE


@pytest.mark.parametrize(
    ("base", "sets"),
    [
        (['prompts.system=""'], ["prompts.system=Think."]),
        (["grade.answer_pattern=(.+)"], ["grade.answer_pattern=null"]),
        ([REWARDS.replace("most: 1", "most: '1'")], ["grade.rewards.a.settings.most=2"]),
        ([REWARDS.replace("most: 1", "most: '{a: 1, b: 2}'")], ["grade.rewards.a.settings.most=2"]),
    ],
)
def test_undoing_words_are_read_as_the_old_values(base, sets):
    """`prompts.system=` was offered, which is refused, and the text 1 came back as a number."""
    old = resolve(BASE, base)
    run = resolve(old, sets)
    words = undoing(differences(old, run))
    assert words[::2] == ["--set"]
    assert differences(old, resolve(run, words[1::2])) == []


@pytest.mark.parametrize("was", ["null", "'quoted'"])
def test_undoing_offers_nothing_for_text_that_cannot_be_set(was):
    assert undoing([("prompts.system", was, "x"), ("label.gamma", 0.3, 1.0)]) == []


def test_undoing_offers_nothing_for_a_value_of_several_parts():
    assert undoing([("label.gamma", 0.3, 1.0), ("rollout.stop", ["a", "b"], [])]) == []


def test_an_entry_of_a_list_is_changed_by_its_name():
    base = resolve(BASE, [REWARDS])
    run = resolve(base, ["grade.rewards.a.weight=0.25", "grade.rewards.a.settings.least=2", "grade.rewards.b.deadline_s=5"])
    assert [(r.name, r.weight, r.deadline_s) for r in run.grade.rewards] == [("a", 0.25, 60.0), ("b", 1.0, 5.0)]
    assert run.grade.rewards[0].settings == {"most": 1, "least": 2}
    assert differences(base, run)[0] == ("grade.rewards.a.settings.least", None, 2)
    assert load(yaml.safe_load(run.to_yaml())) == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grade.rewards.c.weight=1", "grade.rewards.c: unknown setting"),
        ("grade.rewards.a.wait=1", "grade.rewards.a.wait: unknown setting. Did you mean 'grade.rewards.a.weight'"),
        ("grade.rewards.a=1", "is one entry of a list"),
        ("grade.rewards.a.weight=heavy", "Input should be a valid number"),
        ("grade.rewards=x", "grade.rewards: .*several settings"),
    ],
)
def test_a_wrong_override_of_an_entry_is_named(override, message):
    with pytest.raises(SettingError, match=message):
        resolve(resolve(BASE, [REWARDS]), [override])


def test_an_unknown_sink_is_one_line_that_lists_those_there_are():
    with pytest.raises(SettingError, match=r"'tensorboard', 'wandb' or 'mlflow' \(got 'tensorbord'\)"):
        resolve(demo(), ["metrics.sinks=tensorbord"])


def test_sinks_may_be_named_with_commas_and_once():
    run = resolve(demo(), ["metrics.sinks=mlflow, wandb,mlflow"])
    assert run.metrics.sinks == ("mlflow", "wandb")


def test_sinks_decide_no_result():
    """Other sinks make no shard stale, and a resume takes them without --accept-changes."""
    other = resolve(demo(), ["metrics.sinks=wandb"])
    assert all(other.digest(s.settings) == demo().digest(s.settings) for s in PLAN)
    assert {name for name, *_ in differences(demo(), other) if decides(name)} == set()
