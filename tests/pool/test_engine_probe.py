"""The probe of an engine: which sequence, and which answers are those of before."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.fakes import FakeEngine
from actors.pool.probe import STRANGE, TOLERANCE, difference, disagreement, sequence
from pipeline import config
from pipeline.contract import Failure, Policy

ENGINE = FakeEngine(config.Model(), config.Pool(), config.ScoreSettings())
FACTS = ENGINE.facts()


@given(st.integers(2, 200_000), st.integers(2, 40_000))
def test_the_sequence_fits_every_vocabulary_and_window(vocab, window):
    asked = sequence(replace(FACTS, vocab_size=vocab, max_model_len=window))
    assert asked.prompt
    assert asked.response
    assert len(asked.prompt) + len(asked.response) <= window
    assert 0 <= min(asked.prompt + asked.response) <= max(asked.prompt + asked.response) < vocab


def test_an_engine_answers_it():
    [score] = ENGINE.score([sequence(FACTS)], Policy(0))
    assert not isinstance(score, Failure)
    assert len(score.logprobs) == 16


BEFORE = {0: [-1.0, -2.5], 3: [-0.5, -0.25]}


@pytest.mark.parametrize(
    ("now", "dtype", "told"),
    [
        (BEFORE, "float32", ""),
        ({0: [-1.0005, -2.5], 3: [-0.5, -0.25]}, "float32", ""),
        ({0: [-1.0, -2.5], 3: [-0.5, -0.26]}, "float32", "log-probs of policy 3 differ by 0.01 nat"),
        ({0: [-1.1, -2.5], 3: [-0.5, -0.25]}, "bfloat16", ""),
        ({0: [-math.log(57)] * 2, 3: [-0.5, -0.25]}, "bfloat16", "log-probs of policy 0 differ by 3.04 nat"),
        ({0: [-1.0, math.nan], 3: [-0.5, -0.25]}, "bfloat16", "log-probs of policy 0 differ by nan nat"),
        ({0: [-1.0, -2.5]}, "float32", "log-probs of policy 3 differ by inf nat"),
        ({0: [-1.0], 3: [-0.5, -0.25]}, "float32", "log-probs of policy 0 differ by inf nat"),
    ],
)
def test_answers_are_those_of_before_within_the_tolerance_of_their_dtype(now, dtype, told):
    found = difference(BEFORE, now, dtype)
    assert found.startswith(f"{STRANGE}: {told}") if told else found == ""


def test_an_answer_of_minus_log_v_on_every_token_never_passes():
    """The fixed sequence has tokens of many different log-probs, so a flat answer is far off on some of them."""
    [score] = ENGINE.score([sequence(FACTS)], Policy(0))
    flat = [-math.log(FACTS.vocab_size)] * len(score.logprobs)
    assert np.abs(np.asarray(flat) - score.logprobs).max() > max(TOLERANCE.values())
    assert difference({0: score.logprobs.tolist()}, {0: flat}, "float16")


def test_the_facts_in_which_engines_disagree_are_named():
    assert disagreement(FACTS, FACTS) == ""
    assert disagreement(replace(FACTS, dtype="bfloat16"), FACTS) == "dtype is 'bfloat16', the first engine's 'float32'"
    assert disagreement(replace(FACTS, fallback="its own words"), FACTS) == ""
