"""The fake engine keeps the promises of the real one that other tests build on."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.fakes import END_TOKEN, FakeEngine, most_likely, token_evidence
from pipeline import config
from pipeline.contract import Failure, Generate, Policy, Sampling, Sequence
from pipeline.errors import SettingError
from pipeline.stages.signals import broken

FAKE = FakeEngine(config.Model(), config.Pool(), config.ScoreSettings())
SAMPLING = Sampling(1.0, 1.0, 0, 16)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), version=st.integers(0, 99), length=st.integers(1, 200))
def test_a_trace_depends_on_seed_and_policy_and_scores_to_its_own_numbers(seed, version, length):
    prompt, policy = [1] * length, Policy(version)
    alone = FAKE.generate([Generate(prompt, seed)], policy, SAMPLING)[0]
    among = FAKE.generate([Generate([3], 1), Generate(prompt, seed)], policy, SAMPLING)[1]
    score = FAKE.score([Sequence(prompt, alone.tokens.tolist())], policy)[0]
    for one, other in ((alone, among), (alone, score)):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.logprobs, other.logprobs)
        assert np.array_equal(one.entropy, other.entropy)
    assert alone.policy_version == version
    assert (alone.finish_reason == "stop") == (alone.tokens[-1] == END_TOKEN)
    assert alone.logprobs.dtype == alone.entropy.dtype == np.float32
    assert (alone.logprobs < 0).all()
    assert ((alone.entropy >= 0) & (alone.entropy <= math.log(57))).all()


def test_policies_differ_and_the_formula_is_the_stated_one():
    first, second = (FAKE.generate([Generate([1, 2], 5)], Policy(v), SAMPLING)[0] for v in (0, 1))
    assert first.tokens.tolist() != second.tokens.tolist()
    logprobs, entropy = token_evidence(np.array([10]), version=2, prompt_length=3, vocab_size=57)
    assert logprobs[0] == np.float32(-(1 + (70 + 22 + 9) % 97) / 50)
    assert entropy[0] == np.float32(math.log(57) * ((130 + 34 + 15) % 101) / 100)


def test_what_does_not_fit_is_a_failure_of_its_row():
    long = [1] * 256
    answers = FAKE.generate([Generate(long, 0), Generate([1], 0)], Policy(0), SAMPLING)
    assert [isinstance(answer, Failure) for answer in answers] == [True, False]
    answers = FAKE.score([Sequence(long, [1]), Sequence([1], []), Sequence([1], [2])], Policy(0))
    assert [isinstance(answer, Failure) for answer in answers] == [True, True, False]


def test_kept_tokens_are_the_likeliest_and_fit_the_tokens_own_log_prob():
    fake = FakeEngine(config.Model(), config.Pool(), config.ScoreSettings(keep_topk=57))
    [score] = fake.score([Sequence([1, 2], list(range(57)))], Policy(1))
    assert broken(score, 57) is None
    assert score.topk_tokens.shape == score.topk_logprobs.shape == (57, 57)
    ids, values = most_likely(np.array([56]), np.float32([-1.0]), 4, 57)  # .368; a half, a quarter, an eighth of .632
    rest = math.log1p(-math.exp(-1))
    np.testing.assert_allclose(values[0], sorted([-1.0, *(rest - j * math.log(2) for j in (1, 2, 3))])[::-1], rtol=1e-6)
    assert ids[0].tolist() == [56, 0, 1, 2]
    with pytest.raises(
        SettingError, match=r"score\.keep_topk: 58 is more than the 57 tokens of the teacher's vocabulary\. Set it"
    ):
        FakeEngine(config.Model(), config.Pool(), config.ScoreSettings(keep_topk=58))


def test_bounds_are_said_where_they_are_asked_for():
    fake = FakeEngine(config.Model(), config.Pool(), config.ScoreSettings(entropy="bounds"))
    assert fake.facts().entropy_method == "bounds"
    assert fake.generate([Generate([1], 0)], Policy(0), SAMPLING)[0].entropy_error > 0
