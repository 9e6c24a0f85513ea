"""A pool that cannot go on ends with its reason, and one that shares a card takes its turns. Real Ray, fake engines."""

import os
import re
import signal
import socket
import time
from functools import partial

import numpy as np
import pytest
import ray
from pools import BASE, MODEL, REQUESTS, SAMPLING, SCORE, in_thread, same, serving, undisturbed
from waiting import until

from actors.fakes import Behaviour, FakeEngine
from actors.pool.member import seeing
from actors.pool.pool import EnginePool
from pipeline import config, notices
from pipeline.contract import Policy, Sequence
from pipeline.errors import EngineError, ModelError, ResourceError, SettingError, StoreError
from pipeline.live import card
from pipeline.store.directory import Store

pytestmark = pytest.mark.timeout(900)


def test_an_engine_that_cannot_start_ends_the_pool_with_its_own_error(start):
    wrong = ModelError("no such folder", "models/none", "Set model.path")
    pool = start(behaviour=Behaviour(start_error=wrong))
    for ask in (pool.facts, lambda: pool.generate(REQUESTS, BASE, SAMPLING)):
        with pytest.raises(ModelError, match=r"models/none: no such folder\. Set model\.path") as caught:
            ask()
        assert not isinstance(caught.value, ray.exceptions.RayTaskError)


def test_an_engine_that_does_not_start_in_time_ends_the_pool(start):
    pool = start(behaviour=Behaviour(start_s=30), start_timeout_s=1.5)
    with pytest.raises(EngineError, match=r"did not start within 1\.5 s"):
        pool.facts()


def test_an_engine_whose_numbers_mean_something_else_ends_the_pool(start, tmp_path):
    """It falls back to bounds where the first has exact entropies: no batch reaches it, and no one mixes them."""
    odd = tmp_path / "odd"
    pool = start(size=1, behaviour=Behaviour(falls_back=str(odd)))
    assert pool.facts().entropy_method == "exact"
    odd.touch()
    pool.resize(2)
    until(lambda: len(pool.overview().engines) == 1)
    for ask in (pool.facts, lambda: pool.generate(REQUESTS, BASE, SAMPLING)):
        with pytest.raises(EngineError, match=r"engines\.rollout: .* entropy_method is 'bounds', the first engine's 'exact'"):
            ask()
    assert sum(engine.rows for engine in pool.overview().engines) == 0


def test_bounds_in_the_place_of_exact_entropies_are_told_at_the_terminal_or_end_the_pool(ray_local, start, tmp_path):
    """The second engine's reason may read otherwise: it is told, and not compared."""
    said = []
    with notices.shown(said.append):
        pool = start(size=2, behaviour=Behaviour(falls_back=str(tmp_path)))
        assert pool.facts().entropy_method == "bounds"
        until(lambda: said)
    assert said[0].startswith("warning: engines.rollout: entropies are bounds and not exact (the fake was told so).")
    strict = config.ScoreSettings(fallback=False)
    engine = partial(FakeEngine, behaviour=Behaviour(falls_back=str(tmp_path)))
    small = config.Pool(placement=config.Placement(cpus=0.1))
    strict_pool = EnginePool.start("score", MODEL, small, strict, engine)
    with pytest.raises(EngineError, match=r"exact entropies are not available.*score\.fallback=true"):
        strict_pool.facts()
    strict_pool.close()


def test_processes_that_die_while_loading_end_the_pool(start):
    pool = start(behaviour=Behaviour(start_kills=True))
    with pytest.raises(EngineError, match="3 engines could not be loaded, the last one because its process died"):
        pool.facts()


def test_a_users_error_reaches_the_caller_and_costs_no_engine(start):
    pool = start(behaviour=Behaviour(wrong_adapter="bad"))
    pool.facts()
    with pytest.raises(ModelError, match="bad"):
        pool.generate(REQUESTS, Policy(1, "bad"), SAMPLING)
    assert same(pool.generate(REQUESTS, BASE, SAMPLING), undisturbed())


def test_a_pool_the_cluster_can_never_hold_is_refused_at_once(ray_local):
    gpus = config.Pool(placement=config.Placement(gpus=1))
    with pytest.raises(ResourceError, match=r"engines\.score\.placement: one asks for 1 CPU, 1 GPU"):
        EnginePool.start("score", MODEL, gpus, SCORE, FakeEngine)
    labelled = config.Pool(placement=config.Placement(labels={"role": "rollout"}))
    with pytest.raises(ResourceError, match="no node has the label role=rollout"):
        EnginePool.start("score", MODEL, labelled, SCORE, FakeEngine)


def test_a_closed_pool_says_so(start):
    pool = start()
    pool.facts()
    pool.close()
    with pytest.raises(EngineError, match=r"engines\.rollout: the pool (is gone|was closed)"):
        pool.generate(REQUESTS, BASE, SAMPLING)


def test_a_woken_engine_that_answers_minus_log_v_is_replaced(start, told):
    """The fixed sequence is scored again before any answer counts. The next engine starts anew and answers as the first did."""
    pool = start(size=1, behaviour=Behaviour(sleeps=True, wakes_wrong=True), colocate=True)
    before = pool.score([Sequence([1, 2], [4, 5, 6])], BASE)
    [first] = pool.overview().engines
    pool.sleep()
    assert [engine.state for engine in pool.overview().engines] == ["asleep"]
    pool.wake()
    [score] = pool.score([Sequence([1, 2], [4, 5, 6])], BASE)
    assert np.array_equal(score.logprobs, before[0].logprobs)
    [(name, cause, _)] = pool.overview().gone
    assert name == first.name
    assert cause.startswith("answers a fixed sequence otherwise than before: log-probs of policy 0 differ by ")
    until(lambda: any("otherwise than before" in line and "is replaced" in line for line in told))


def test_an_engine_that_dies_asleep_is_replaced_in_the_engines_turn_only(start):
    pool = start(size=1, behaviour=Behaviour(sleeps=True), colocate=True)
    pool.facts()
    [first] = serving(pool)
    pool.sleep()
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: not pool.overview().engines)
    answer = in_thread(lambda: pool.generate(REQUESTS, BASE, SAMPLING))
    time.sleep(1)  # the dispatcher looks at its size four times in this time
    assert pool.overview().engines == []
    pool.wake()
    assert same(answer(), undisturbed())


def test_a_dispatcher_that_is_restarted_starts_nothing_in_the_trainers_turn_and_is_told_in_the_engines(start):
    pool = start(size=1, behaviour=Behaviour(sleeps=True), colocate=True)
    pool.facts()
    pool.sleep()
    ray.kill(pool._dispatcher, no_restart=False)
    until(lambda: not pool.overview().engines)
    time.sleep(3)  # longer than the driver's thread waits between two looks
    seen = pool.overview()
    assert (seen.engines, seen.asleep) == ([], True)
    pool.wake()
    assert same(pool.generate(REQUESTS, BASE, SAMPLING), undisturbed())
    ray.kill(pool._dispatcher, no_restart=False)
    assert same(pool.generate(REQUESTS, BASE, SAMPLING), undisturbed())


def test_a_card_that_the_trainer_holds_keeps_an_engine_waiting(start):
    """Also an engine that starts out of turn does not use the card: it needs the lock that the trainer holds."""
    trainer = card.Card(card.name_here())
    assert trainer.take()
    pool = start(size=1, colocate=True)
    until(lambda: any(engine.pid for engine in pool.overview().engines))
    time.sleep(1)
    assert [engine.state for engine in pool.overview().engines] == ["loading"]
    trainer.release()
    assert same(pool.generate(REQUESTS, BASE, SAMPLING), undisturbed())
    assert not trainer.take(within_s=0)
    pool.sleep()  # this engine cannot sleep, so it is ended
    assert trainer.take(within_s=30)
    trainer.release()
    with pytest.raises(SettingError, match="one engine shares the card with the trainer, and 2 are asked for"):
        pool.resize(2)


def test_a_node_that_does_not_see_the_run_gets_no_engine_and_is_named(ray_local, tmp_path):
    """A node that joins later was never asked: the run ended in a later round, with the advice to publish the adapter again."""
    store, small = Store(str(tmp_path)), config.Pool(max=2, placement=config.Placement(cpus=0.1))
    here = rf"node {socket.gethostname()} does not see this run \(lease\.json is not there\)\. Give --run a place that every node"
    blind = EnginePool.start("score", MODEL, small, SCORE, partial(seeing, store, FakeEngine))
    with pytest.raises(StoreError, match=here):
        blind.facts()
    blind.close()
    store.write_json("lease.json", {})
    said = []
    with notices.shown(said.append):
        pool = EnginePool.start("rollout", MODEL, small, SCORE, partial(seeing, store, FakeEngine))
        pool.facts()
        store.delete("lease.json")  # as for a node that joins and does not see it
        pool.resize(2)
        until(lambda: said)
    assert re.match(rf"warning: engines\.rollout: one more engine does not start\. The pool goes on without it.*{here}", said[0])
    assert same(pool.generate(REQUESTS, BASE, SAMPLING), undisturbed())
    pool.close()
