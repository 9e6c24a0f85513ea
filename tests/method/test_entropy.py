"""Exact entropy against float64, bounds that hold, memory that stays bounded."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.method import entropy


def entropy_of(p: np.ndarray) -> np.ndarray:
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
    lower, upper = entropy.bounds(top(p, k), p.shape[1])
    exact = entropy_of(p)
    assert (lower <= exact + 1e-9).all()
    assert (exact <= upper + 1e-9).all()
    assert (lower >= -1e-12).all()
    assert (upper <= math.log(p.shape[1]) + 1e-9).all()


@given(distributions())
@settings(max_examples=50, deadline=None)
def test_bounds_tighten_with_k_and_meet_at_the_vocabulary(p: np.ndarray) -> None:
    widths = [upper - lower for lower, upper in (entropy.bounds(top(p, k), p.shape[1]) for k in range(1, p.shape[1] + 1))]
    assert all((after <= before + 1e-9).all() for before, after in pairwise(widths))
    np.testing.assert_allclose(widths[-1], 0, atol=1e-9)


def test_bounds_by_hand() -> None:
    # kept .5 and .2, tail .3 over three tokens: at least one atom of .2 and one of .1, at most three of .1
    lower, upper = entropy.bounds(np.log([[0.2, 0.5]]), 5)
    assert lower[0] == pytest.approx(entropy_of(np.array([0.5, 0.2, 0.2, 0.1])))
    assert upper[0] == pytest.approx(entropy_of(np.array([0.5, 0.2, 0.1, 0.1, 0.1])))
    order = entropy.bounds(np.log([[0.5, 0.2]]), 5)
    assert (order[0][0], order[1][0]) == (lower[0], upper[0])


def test_bounds_of_single_precision_log_probs_may_sum_beyond_one() -> None:
    kept = np.full((1, 4), np.log(0.25) + 1e-6, np.float32)
    lower, upper = entropy.bounds(kept, 50_000)
    assert lower[0] == pytest.approx(math.log(4), abs=1e-4)
    assert lower[0] <= upper[0]
    certain = entropy.bounds(np.array([[0.0, -np.inf]], np.float32), 50_000)
    assert certain[0][0] == certain[1][0] == 0


def test_bounds_take_no_rows_and_refuse_other_shapes() -> None:
    assert entropy.bounds(np.empty((0, 3)), 9)[0].shape == (0,)
    for bad in (np.zeros(3), np.zeros((2, 0)), np.zeros((2, 10))):
        with pytest.raises(ValueError, match="top_logprobs"):
            entropy.bounds(bad, 9)


@given(distributions(), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_exact_entropy_is_the_entropy(p: np.ndarray, chunk: int) -> None:
    with np.errstate(divide="ignore"):
        logits = torch.tensor(np.log(p))  # zeros become -inf
    found = entropy.exact_entropy(logits, chunk)
    np.testing.assert_allclose(found, entropy_of(p), atol=2e-6)
    torch.testing.assert_close(entropy.exact_entropy(logits + 50, 3), found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_of_a_real_vocabulary(dtype: torch.dtype) -> None:
    logits = (torch.randn(9, 49_152, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    found = entropy.exact_entropy(logits, chunk=4)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)
    uniform = entropy.exact_entropy(torch.zeros(1, 151_936))
    assert float(uniform) == pytest.approx(math.log(151_936), abs=2e-6)


def test_only_a_chunk_exists_in_single_precision() -> None:
    logits = torch.zeros(64, 50_000, dtype=torch.bfloat16)
    with torch.profiler.profile(profile_memory=True) as seen:
        entropy.exact_entropy(logits, chunk=2)
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak <= 4 * (2 * 50_000 * 4)  # four chunks' worth, where the whole in fp32 is 64 rows


def test_entropy_refuses_other_shapes_and_takes_no_rows() -> None:
    assert entropy.exact_entropy(torch.empty(0, 7)).shape == (0,)
    with pytest.raises(ValueError, match="logits"):
        entropy.exact_entropy(torch.zeros(7))
    with pytest.raises(ValueError, match="logits"):
        entropy.exact_entropy(torch.zeros(2, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="chunk"):
        entropy.exact_entropy(torch.zeros(2, 7), chunk=0)
