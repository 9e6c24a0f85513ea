"""reasoning-gym tasks: solutions that reach the answer, and test problems that training never sees."""

from __future__ import annotations

import pickle
import sys

import pytest

from pipeline.answers.responses import last_boxed
from pipeline.config import Source
from pipeline.contract import Reject
from pipeline.errors import SettingError, SourceError
from pipeline.problems.sources import open_source

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def source(task: str, split: str = "train", seed: int = 0, **options) -> Source:
    return Source(uri=f"reasoning-gym:{task}", split=split, seed=seed, options=options, size=1000)


def test_chain_sum_is_worked_from_left_to_right():
    rows = open_source(source("chain_sum", min_terms=3, max_terms=3, allow_negation=True)).rows(range(50))
    for row in rows:
        expression = row.problem.removeprefix("State the final answer to the following arithmetic problem: ").removesuffix(" =")
        *steps, closing = row.solution.split(". ")
        assert closing == f"The answer is \\boxed{{{row.answer}}}."
        assert len(steps) == 2
        assert all(eval(left) == int(right) for left, right in (step.split(" = ") for step in steps))
        assert steps[-1].endswith(f"= {eval(expression)}")
        assert last_boxed(row.solution) == row.answer == str(eval(expression))


def test_without_the_library_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SourceError, match=r"^source\.uri: reasoning-gym cannot be imported .*pip install 'egrsd\[gym\]'"):
        open_source(source("chain_sum"))


@pytest.mark.parametrize(("task", "told"), [("chain_sum", False), ("letter_counting", False), ("countdown", True)])
def test_a_task_with_several_right_answers_is_told(task, told):
    said = open_source(source(task)).cautions()
    assert len(said) == told
    assert not told or said[0].startswith("note: reasoning-gym:countdown: countdown may have several right answers")


def test_a_sum_of_one_term_needs_no_steps():
    row = open_source(source("chain_sum", min_terms=1, max_terms=1)).rows([0])[0]
    assert row.solution == f"The answer is \\boxed{{{row.answer}}}."


def test_other_tasks_use_their_own_working_or_just_the_answer():
    worked = open_source(source("gsm_symbolic")).rows([0])[0]
    assert len(worked.solution) > 80
    assert last_boxed(worked.solution) == worked.answer
    bare = open_source(source("spell_backward")).rows([0])[0]
    assert bare.solution == f"The answer is \\boxed{{{bare.answer}}}."


def test_train_and_test_share_no_problem_even_where_there_are_few():
    train = {row.problem for row in open_source(source("chain_sum", **ONE_DIGIT)).rows(range(1000))}
    test = {row.problem for row in open_source(source("chain_sum", "test", **ONE_DIGIT)).rows(range(1000))}
    assert not train & test
    assert len(train | test) > 190  # of 200
    assert 20 < len(test) < 60


def test_a_problem_depends_on_seed_split_and_index_only():
    problems = open_source(source("chain_sum", seed=5))
    assert pickle.loads(pickle.dumps(problems)).rows([3, 900]) == [problems.rows(range(1000))[i] for i in (3, 900)]
    assert problems.fingerprint != open_source(source("chain_sum", seed=6)).fingerprint
    assert problems.rows([0]) != open_source(source("chain_sum", seed=6)).rows([0])


def test_wrong_options_and_splits_are_named():
    with pytest.raises(SettingError, match=r"source\.options\.min_termz: unknown option. Did you mean 'min_terms'\?"):
        open_source(source("chain_sum", min_termz=2))
    with pytest.raises(SettingError, match=r"source\.options: chain_sum refuses them: max_terms must be"):
        open_source(source("chain_sum", min_terms=9))
    with pytest.raises(SettingError, match=r"source\.split"):
        open_source(source("chain_sum", "validation"))
    with pytest.raises(SourceError, match="too few different problems"):
        open_source(
            source("chain_sum", "test", min_terms=1, max_terms=1, min_digits=1, max_digits=1).model_copy(update={"size": 8})
        )


def test_an_answer_that_is_no_text_is_rejected_not_invented():
    rows = open_source(source("countdown")).rows(range(20))
    assert all(row.reject in {None, Reject.MISSING_SOLUTION, Reject.MISSING_ANSWER} for row in rows)


@pytest.mark.parametrize(("option", "value"), [("min_terms", "010"), ("allow_negation", "no"), ("min_digits", True)])
def test_an_option_of_another_type_is_refused(option, value):
    with pytest.raises(SettingError, match=rf"source.options.{option}: should be of type"):
        open_source(source("chain_sum", **{option: value}))
