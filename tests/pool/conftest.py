"""Pools of fake engines in real Ray, and what a person at the terminal is told of them."""

from functools import partial

import pytest
from pools import MODEL, NORMAL, SCORE

from actors.fakes import FakeEngine
from actors.pool.pool import EnginePool
from pipeline import config, notices


@pytest.fixture
def start(ray_local):
    """Starts pools of fake engines and closes them."""
    pools = []

    def start(size=1, inflight=4, behaviour=NORMAL, most=None, kind=config.Pool, **settings):
        settings = kind(min=size, max=max(1, most or size), placement=config.Placement(cpus=0.1), **settings)
        made = EnginePool.start("rollout", MODEL, settings, SCORE, partial(FakeEngine, behaviour=behaviour), inflight)
        pools.append(made)
        return made

    yield start
    for pool in pools:
        pool.close()


@pytest.fixture
def told():
    """What the person at the terminal was told."""
    lines = []
    with notices.shown(lines.append):
        yield lines
