"""Requests to pools of fake engines, and what tests of pools wait for."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from actors.fakes import Behaviour, FakeEngine
from pipeline import config
from pipeline.contract import Generate, Policy, Sampling

SAMPLING = Sampling(1.0, 1.0, 0, 32)
MODEL, SCORE = config.Model(), config.ScoreSettings()
NORMAL, BASE = Behaviour(), Policy(0)
REQUESTS = [Generate([1, 5, 6, 7], seed) for seed in range(40)]


def undisturbed(requests=REQUESTS, policy=BASE):
    return FakeEngine(MODEL, config.Pool(), SCORE).generate(requests, policy, SAMPLING)


def same(got, expected):
    return all(
        np.array_equal(a.tokens, b.tokens) and np.array_equal(a.logprobs, b.logprobs) and np.array_equal(a.entropy, b.entropy)
        for a, b in zip(got, expected, strict=True)
    )


def serving(pool):
    return [engine for engine in pool.overview().engines if engine.state == "serving"]


def in_thread(work):
    """Starts `work` in a thread. The function that is returned waits for its answer, and raises its error."""
    return partial(ThreadPoolExecutor(1).submit(work).result, timeout=300)
