"""A question of one's own: the prompt that training uses, an answer of each policy, and the teacher's view with a reference."""

import pytest

from actors.fakes import FakeEngine
from pipeline.errors import StoreError, UserError
from pipeline.evidence.question import Answered, answers, prompt_of, reference_prompt, verdicts
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.recipes import demo
from pipeline.stages.chat import context_prompt, student_prompt
from pipeline.store.directory import Store


@pytest.fixture
def engine():
    run = demo()
    return FakeEngine(run.model, run.engines.rollout, run.score)


def test_the_prompts_are_those_of_training():
    run = demo()
    tokenizer = tokenizer_of(run.model)
    assert prompt_of(run, "1+2") == student_prompt(tokenizer, "1+2", run.prompts.student)
    assert reference_prompt(run, "1+2", "3") == context_prompt(
        tokenizer, {"problem": "1+2", "solution": "3"}, run.prompts.teacher
    )


def test_each_policy_answers_and_the_teacher_scores_the_answer(tmp_path, engine):
    run, store = demo(), Store(str(tmp_path))
    prompt = prompt_of(run, "1+2")
    [plain] = answers(store, run, [0], (prompt, None), engine)
    [seen] = answers(store, run, [0], (prompt, reference_prompt(run, "1+2", "3")), engine)
    assert plain.text == seen.text
    assert plain.teacher_logprob is None
    assert seen.teacher_logprob is not None
    assert seen.tokens == plain.tokens > 0
    assert all(0 <= place < seen.tokens and apart < 0 for place, _, apart in seen.partings)


@pytest.mark.parametrize(
    ("reference", "read", "text", "finish", "verdict"),
    [
        ("1+2=3#3", "3", "1+2=3#3", "stop", "correct"),
        ("1+2=3#3", "3", "1+2=4#4", "stop", "wrong"),
        ("3", "3", "1+2=3#3", "stop", "correct"),  # the answer alone
        ("3", "3", "1+2=3", "stop", "unparsable"),
        ("3", "3", "1+2=3#3", "length", "truncated"),
    ],
)
def test_answers_are_graded_where_a_reference_is_given(reference, read, text, finish, verdict):
    """A newcomer gave a reference that ended with the answer, and had to compare by eye."""
    one = Answered(0, text, 3, finish, 0.0, 0.0)
    answer, [(given, _)] = verdicts(demo(), reference, [one])
    assert (answer, given) == (read, verdict)


def test_a_policy_that_is_not_there_and_a_long_question_are_refused(tmp_path, engine):
    run = demo()
    with pytest.raises(StoreError, match="policy 3 is not published"):
        answers(Store(str(tmp_path)), run, [3], (prompt_of(run, "1"), None), engine)
    with pytest.raises(UserError, match=r"the question is too long: \d+ \+ 72 new tokens > 128"):
        prompt_of(run, "1+" * 100)
