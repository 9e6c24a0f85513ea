"""What an evaluation asks: samples and shards, and what is refused before anything starts."""

import json

import pytest

from pipeline import recipes
from pipeline.errors import SettingError, UserError
from pipeline.evidence.asked import ask
from pipeline.overrides import resolve


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_more_samples_than_k_make_pass_at_k_an_estimate(tmp_path):
    problems = [{"problem": f"{i}+1+1+1", "answer": str(i + 3)} for i in range(40)]
    one = ask(recipes.demo(), write(tmp_path / "sums.jsonl", problems), 2, ["evaluation.samples=6"])
    assert (one.k, one.run.rollout.group_size, one.problems) == (2, 6, 40)
    assert one.run.rollout.prompts_per_shard == 5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "1+1", "answer": ""}] * 5, "none of its 5 problems can be asked and graded: column 'answer' is empty"),
        ([{"problem": "1+1", "result": "2"}] * 5, "has no column 'answer'"),
        ([{"problem": "1+1", "answer": "2"}], "1 problem is too few for an interval"),
        ([{"problem": "1+1", "answer": "2"}, {"problem": "", "answer": "2"}], "only 1 of 2 problems can be asked"),
    ],
)
def test_a_source_that_cannot_be_evaluated_is_refused_before_anything_starts(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        ask(recipes.demo(), write(tmp_path / "a.jsonl", rows), 1, [])


@pytest.mark.parametrize(
    ("k", "sets", "message"),
    [
        (0, [], "at least one sample a problem is needed"),
        (4, ["evaluation.samples=2"], "is 2, fewer than -k 4"),
        (1, ["train.learning_rate=1"], "evaluation does not read this setting"),
    ],
)
def test_a_setting_that_cannot_be_asked_for_is_refused(k, sets, message):
    with pytest.raises(SettingError, match=message):
        ask(recipes.demo(), "", k, sets)


@pytest.mark.parametrize("spec", ["gsm8k", "gsm8k=/data/copy.jsonl"])
def test_a_benchmark_refuses_settings_of_a_source(spec):
    """They were dropped without a word."""
    with pytest.raises(SettingError, match=f"benchmark {spec} has columns and a split of its own") as caught:
        ask(recipes.demo(), spec, 1, ["evaluation.samples=2", "evaluation.source.answer=result"])
    assert caught.value.where == "evaluation.source.answer"


def test_settings_that_decide_answers_decide_the_folder_and_others_do_not():
    kind = lambda *sets: ask(recipes.demo(), "", None, list(sets)).kind  # noqa: E731
    assert kind() == kind("engines.inflight_shards=3")
    assert len({kind(), kind("seed=7"), kind("evaluation.temperature=0.5"), kind("evaluation.problems=8")}) >= 3


JUDGED = ["grade.rewards=[{name: tests, function: python_tests}]", "grade.verdict_reward=tests"]


@pytest.mark.parametrize(
    ("is_benchmark", "sets", "decides"),
    [
        (True, [], "math"),
        (True, ["grade.verdict_reward=tests"], "tests"),
        (True, ["grade.verifier=exact"], "exact"),
        (True, ["grade.verdict_reward=null"], "math"),
        (False, [], "tests"),
        (False, ["grade.verifier=exact"], "exact"),
        (False, ["grade.verdict_reward=null"], "exact"),
    ],
)
def test_who_decides_verdicts_is_what_was_asked_for(tmp_path, is_benchmark, sets, decides):
    """A reward that was asked for on a benchmark was dropped, and a verifier that was asked for was not read."""
    rows = [{"question": "1+1", "problem": "1+1", "answer": "2"}] * 4
    uri = write(tmp_path / "a.jsonl", rows)
    run = resolve(recipes.demo(), [*JUDGED, "grade.verifier=exact"])
    grade = ask(run, f"gsm8k={uri}" if is_benchmark else uri, 1, sets).run.grade
    assert (grade.verdict_reward or grade.verifier) == decides
    assert [reward.name for reward in grade.rewards] == (["tests"] if decides == "tests" else [])


def test_a_verifier_and_a_reward_cannot_both_decide(tmp_path):
    run = resolve(recipes.demo(), JUDGED)
    uri = write(tmp_path / "a.jsonl", [{"problem": "1+1", "answer": "2"}] * 4)
    with pytest.raises(SettingError, match=r"'tests' decides, so grade\.verifier is not read"):
        ask(run, uri, 1, ["grade.verifier=math", "grade.verdict_reward=tests"])
