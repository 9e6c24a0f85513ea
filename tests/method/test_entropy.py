"""Exact entropy against float64, bounds that hold, memory that stays bounded."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pipeline.method import entropy
from pipeline.method.bounds import bounds


def exactly(p: np.ndarray) -> np.ndarray:
    """-sum p log p of rows of probabilities in float64, 0 log 0 = 0."""
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)


@st.composite
def distributions(draw: st.DrawFn) -> np.ndarray:
    """[N, V] probabilities from near uniform to one-hot, with exact zeros and exact ties among them."""
    rows, vocab = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    logits = rng.normal(size=(rows, vocab)) * draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 300.0]))
    logits = np.round(logits, draw(st.sampled_from([0, 12])))
    if draw(st.booleans()):
        logits[:, 1:][rng.random((rows, vocab - 1)) < 0.5] = -np.inf
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def top(p: np.ndarray, k: int) -> np.ndarray:
    """The k best log-probs of each row, [N, k], ascending: the order must not matter."""
    with np.errstate(divide="ignore"):
        return np.log(np.sort(p, axis=1)[:, -k:])


@given(distributions(), st.integers(1, 40))
@example(np.full((1, 8), 1 / 8), 3)
@example(np.array([[1.0, 0.0, 0.0]]), 1)
@example(np.array([[0.5, 0.5, 0.0]]), 1)
@settings(max_examples=150, deadline=None)
def test_bounds_enclose_the_entropy(p: np.ndarray, k: int) -> None:
    k = min(k, p.shape[1])
    lower, upper = bounds(top(p, k), p.shape[1])
    exact = exactly(p)
    assert (lower <= exact + 1e-9).all()
    assert (exact <= upper + 1e-9).all()
    assert (lower >= -1e-12).all()
    assert (upper <= math.log(p.shape[1]) + 1e-9).all()


@given(distributions())
@settings(max_examples=50, deadline=None)
def test_bounds_tighten_with_k_and_meet_at_the_vocabulary(p: np.ndarray) -> None:
    widths = [upper - lower for lower, upper in (bounds(top(p, k), p.shape[1]) for k in range(1, p.shape[1] + 1))]
    assert all((after <= before + 1e-9).all() for before, after in pairwise(widths))
    np.testing.assert_allclose(widths[-1], 0, atol=1e-9)


def test_bounds_by_hand() -> None:
    # kept .5 and .2, tail .3 over three tokens: at least one atom of .2 and one of .1, at most three of .1
    lower, upper = bounds(np.log([[0.2, 0.5]]), 5)
    assert lower[0] == pytest.approx(exactly(np.array([0.5, 0.2, 0.2, 0.1])))
    assert upper[0] == pytest.approx(exactly(np.array([0.5, 0.2, 0.1, 0.1, 0.1])))
    order = bounds(np.log([[0.5, 0.2]]), 5)
    assert (order[0][0], order[1][0]) == (lower[0], upper[0])


def test_bounds_of_single_precision_log_probs_may_sum_beyond_one() -> None:
    kept = np.full((1, 4), np.log(0.25) + 1e-6, np.float32)
    lower, upper = bounds(kept, 50_000)
    assert lower[0] == pytest.approx(math.log(4), abs=1e-4)
    assert lower[0] <= upper[0]
    certain = bounds(np.array([[0.0, -np.inf]], np.float32), 50_000)
    assert certain[0][0] == certain[1][0] == 0


def test_bounds_take_no_rows_and_refuse_other_shapes() -> None:
    assert bounds(np.empty((0, 3)), 9)[0].shape == (0,)
    for bad in (np.zeros(3), np.zeros((2, 0)), np.zeros((2, 10))):
        with pytest.raises(ValueError, match="top_logprobs"):
            bounds(bad, 9)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 20), vocab=st.integers(2, 300), scale=st.sampled_from([0.0, 1.0, 30.0]), seed=st.integers(0, 99))
def test_entropy_of_any_distribution(rows, vocab, scale, seed):
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    logits[:, 0] = -math.inf  # a masked token
    logprobs = logits.log_softmax(-1)
    got = entropy.entropy_of(logprobs)
    torch.testing.assert_close(got, torch.from_numpy(exactly(logprobs.double().exp().numpy())).float(), atol=2e-6, rtol=2e-6)
    assert ((got >= -1e-6) & (got <= math.log(vocab) + 1e-5)).all()


def test_entropy_does_not_hide_a_nan_and_does_not_depend_on_blocks():
    logprobs = torch.randn(7, 200_000).log_softmax(-1)  # more than a block a row
    logprobs[3, 5] = math.nan
    got = entropy.entropy_of(logprobs)
    assert got.isnan().tolist() == [i == 3 for i in range(7)]
    torch.testing.assert_close(got[6:], entropy.entropy_of(logprobs[6:]), atol=0, rtol=0)
    assert entropy.entropy_of(torch.tensor([[0.0, -math.inf]])).item() == 0.0


@given(distributions())
@settings(max_examples=60, deadline=None)
def test_entropy_of_probabilities_of_which_some_are_zero(p: np.ndarray) -> None:
    with np.errstate(divide="ignore"):
        logprobs = torch.tensor(np.log(p), dtype=torch.float32)  # zeros become -inf
    np.testing.assert_allclose(entropy.entropy_of(logprobs), exactly(p), atol=2e-6)


@given(distributions())
@settings(max_examples=60, deadline=None)
def test_bounds_that_lack_one_token_are_the_entropy(p: np.ndarray) -> None:
    """The self-check of an engine relies on it."""
    assume(p.shape[1] > 1)
    with np.errstate(divide="ignore"):
        kept = np.log(np.sort(p, axis=1)[:, 1:])
    np.testing.assert_allclose(bounds(kept, p.shape[1])[1], exactly(p), atol=1e-9)


def test_entropy_of_a_real_vocabulary() -> None:
    logprobs = (torch.randn(9, 49_152, generator=torch.Generator().manual_seed(0)) * 3).log_softmax(-1)
    expected = torch.distributions.Categorical(logits=logprobs.double()).entropy()
    np.testing.assert_allclose(entropy.entropy_of(logprobs), expected, atol=2e-5)
    uniform = entropy.entropy_of(torch.zeros(1, 151_936).log_softmax(-1))
    assert float(uniform) == pytest.approx(math.log(151_936), abs=2e-5)


def test_only_a_block_is_copied() -> None:
    logprobs = torch.zeros(64, 50_000)
    with torch.profiler.profile(profile_memory=True) as seen:
        entropy.entropy_of(logprobs)
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak <= 4 * (50_000 * 4)  # four blocks of one row, where the whole has 64 rows
