"""The pool of engine actors through real Ray, with the fake engine."""

import os
import signal
import threading
import time
from functools import partial

import numpy as np
import psutil
import pytest
import ray
from ray.exceptions import RayActorError

from actors.fakes import Behaviour, FakeEngine
from actors.pool.pool import EnginePool, Piece, after_death
from pipeline import config, notices
from pipeline.contract import Failure, Generate, Policy, Sampling, Sequence
from pipeline.errors import EngineError, ModelError, ResourceError, SettingError
from pipeline.live import card

SAMPLING = Sampling(1.0, 1.0, 0, 32)
MODEL, SCORE = config.Model(), config.ScoreSettings()
NORMAL, BASE = Behaviour(), Policy(0)
REQUESTS = [Generate([1, 5, 6, 7], seed) for seed in range(40)]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def start(ray_local):
    """Starts pools of fake engines and closes them."""
    pools = []

    def start(size=1, inflight=4, behaviour=NORMAL, most=None, **settings):
        settings = config.Pool(min=size, max=max(1, most or size), placement=config.Placement(cpus=0.1), **settings)
        made = EnginePool.start("rollout", MODEL, settings, SCORE, partial(FakeEngine, behaviour=behaviour), inflight)
        pools.append(made)
        return made

    yield start
    for pool in pools:
        pool.close()


def undisturbed(requests=REQUESTS, policy=BASE):
    return FakeEngine(MODEL, config.Pool(), SCORE).generate(requests, policy, SAMPLING)


def same(got, expected):
    return all(
        np.array_equal(a.tokens, b.tokens) and np.array_equal(a.logprobs, b.logprobs) and np.array_equal(a.entropy, b.entropy)
        for a, b in zip(got, expected, strict=True)
    )


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def serving(pool):
    return [engine for engine in pool.overview().engines if engine.state == "serving"]


def in_thread(work):
    box = {}
    thread = threading.Thread(target=lambda: box.update(answer=work()))
    thread.start()
    return lambda: (thread.join(60), box["answer"])[1]


def test_answers_keep_the_order_of_the_requests(start):
    pool = start(size=2)
    assert pool.facts().engine == "fake"
    assert same(pool.generate(REQUESTS, Policy(3), SAMPLING), undisturbed(policy=Policy(3)))
    sequences = [Sequence([1, 2], [4, 5, 6]), Sequence([1, 2], []), Sequence([1], [7])]
    scores = pool.score(sequences, BASE)
    assert [getattr(score, "cause", None) for score in scores] == [None, "empty response", None]
    assert pool.generate([], BASE, SAMPLING) == []


@ray.remote(num_cpus=0.1)
def ask_from_a_task(pool, seeds):
    return pool.generate([Generate([1, 5, 6, 7], seed) for seed in seeds], BASE, SAMPLING)


def test_a_pool_travels_into_tasks_and_spreads_their_batches(start):
    pool = start(size=2, behaviour=Behaviour(batch_s=2.0))
    wait_for(lambda: len(serving(pool)) == 2)
    answers = ray.get([ask_from_a_task.remote(pool, range(i * 10, i * 10 + 10)) for i in range(4)])
    assert same([row for answer in answers for row in answer], undisturbed())
    assert min(engine.rows for engine in pool.overview().engines) >= 10


def test_a_killed_engine_is_replaced_and_its_batch_asked_again(start):
    pool = start(size=1, behaviour=Behaviour(batch_s=2.0))
    pool.facts()
    answer = in_thread(lambda: pool.generate(REQUESTS, BASE, SAMPLING))
    wait_for(lambda: any(engine.batches for engine in pool.overview().engines))
    victim = pool.overview().engines[0]
    os.kill(victim.pid, signal.SIGKILL)
    assert same(answer(), undisturbed())
    assert [engine.name for engine in pool.overview().engines] != [victim.name]


def stop_and_recover(pool, find):
    """Stop the process that `find` names while one batch is in an engine and one waits. Both are answered all the same."""
    pool.facts()
    answers = [in_thread(lambda: pool.generate(REQUESTS, BASE, SAMPLING)) for _ in range(2)]
    wait_for(lambda: pool.overview().queued and any(engine.batches for engine in pool.overview().engines))
    os.kill(find(), signal.SIGSTOP)
    assert all(same(answer(), undisturbed()) for answer in answers)


@pytest.fixture
def told():
    """What the person at the terminal was told."""
    lines = []
    with notices.shown(lines.append):
        yield lines


def test_a_stopped_engine_is_replaced_and_its_batch_asked_again(start, told):
    pool = start(size=1, inflight=1, behaviour=Behaviour(batch_s=2.0), stall_timeout_s=4.0)
    stop_and_recover(pool, lambda: pool.overview().engines[0].pid)
    assert [cause for _, cause, _ in pool.overview().gone] == ["gave no sign of life for 4 s"]
    wait_for(lambda: any("gave no sign of life for 4 s and is replaced" in line for line in told))


def test_an_engine_that_is_stopped_while_it_loads_is_replaced(start):
    pool = start(size=1, behaviour=Behaviour(start_s=3.0), stall_timeout_s=4.0)
    wait_for(lambda: any(engine.pid for engine in pool.overview().engines))
    os.kill(pool.overview().engines[0].pid, signal.SIGSTOP)
    assert pool.facts().engine == "fake"
    assert [cause for _, cause, _ in pool.overview().gone] == ["an engine gave no sign of life for 4 s while it loaded"]


def test_a_stopped_dispatcher_is_replaced_and_batches_are_asked_again(start, told):
    pool = start(size=1, inflight=1, behaviour=Behaviour(batch_s=2.0), stall_timeout_s=4.0)

    def dispatcher():
        mine = [p for p in psutil.Process().children(recursive=True) if "ray::Dispatcher" in "".join(p.cmdline()[:1])]
        return max(mine, key=psutil.Process.create_time).pid

    stop_and_recover(pool, dispatcher)
    assert told == ["engines.rollout: the stopped dispatcher is replaced"]


def test_engines_that_are_busy_or_slow_are_left_alone(start, told):
    """A load and a batch that last longer than `stall_timeout_s` are signs of work, and not of a stop.

    The deadline is a tenth of the users'. With 2 s it passed at a load of 37, as Ray's workers give way to all other processes.
    """
    pool = start(size=1, behaviour=Behaviour(start_s=7.0, batch_s=7.0), stall_timeout_s=6.0)
    assert same(pool.generate(REQUESTS, BASE, SAMPLING), undisturbed())
    assert pool.overview().gone == []
    assert told == []


def test_an_idle_engine_that_dies_is_replaced_unasked(start):
    pool = start(size=1)
    pool.facts()
    wait_for(lambda: serving(pool))
    victim = pool.overview().engines[0]
    os.kill(victim.pid, signal.SIGKILL)
    wait_for(lambda: [e for e in serving(pool) if e.name != victim.name])
    assert victim.name not in [engine.name for engine in pool.overview().engines]


def test_a_row_that_keeps_killing_its_engine_is_isolated(start):
    """Its neighbours finish, and so does another caller's batch that shared its engine."""
    pool = start(size=1, behaviour=Behaviour(poison_seeds=frozenset({17}), batch_s=0.2), request_tries=3)
    other = [Generate([1, 9], seed) for seed in range(100, 110)]
    beside = in_thread(lambda: pool.generate(other, BASE, SAMPLING))
    answers = pool.generate(REQUESTS, BASE, SAMPLING)
    assert [i for i, a in enumerate(answers) if isinstance(a, Failure)] == [17]
    assert "killed its engine" in answers[17].cause
    expected = undisturbed()
    assert same(answers[:17] + answers[18:], expected[:17] + expected[18:])
    assert same(beside(), undisturbed(other))


def test_a_row_is_not_blamed_for_the_deaths_of_its_neighbours_and_one_more():
    """Three engines die with a poisonous neighbour in the batch; then one, on its own, of something else."""
    answers = [None] * 32
    batch = Piece(list(range(32)))
    for _ in range(3):
        batch = after_death(batch, RayActorError(), 3, answers)[0]
    assert (len(batch.rows), batch.alone, batch.deaths) == (1, True, 3)
    [again] = after_death(batch, RayActorError(), 3, answers)
    assert answers == [None] * 32
    assert after_death(again, RayActorError(), 3, answers) == []
    assert answers[0] == Failure("killed its engine 5 times: " + str(RayActorError()).splitlines()[0])


def test_sizes_outlive_the_dispatcher(start):
    pool = start(size=1)
    pool.resize(2, 3)
    wait_for(lambda: len(serving(pool)) == 2)
    old = {engine.name for engine in serving(pool)}
    ray.kill(pool._dispatcher, no_restart=False)
    wait_for(lambda: len({engine.name for engine in serving(pool)} - old) == 2)
    assert (pool.overview().least, pool.overview().most) == (2, 3)


def test_resize_joins_after_load_and_drains_before_it_ends(start):
    pool = start(size=1, behaviour=Behaviour(batch_s=1.0, start_s=0.3), inflight=1)
    wait_for(lambda: len(serving(pool)) == 1)
    pool.resize(3)
    assert [engine.state for engine in pool.overview().engines] == ["serving", "loading", "loading"]
    wait_for(lambda: len(serving(pool)) == 3)
    waiting = [in_thread(lambda: pool.generate(REQUESTS, BASE, SAMPLING)) for _ in range(3)]
    wait_for(lambda: all(engine.batches == 1 for engine in pool.overview().engines))
    pool.resize(1)
    assert sorted(engine.state for engine in pool.overview().engines) == ["draining", "draining", "serving"]
    assert all(same(answer(), undisturbed()) for answer in waiting)
    wait_for(lambda: len(pool.overview().engines) == 1)


def test_work_that_waits_makes_it_grow_and_idleness_shrinks_it(start):
    pool = start(size=0, most=3, inflight=1, behaviour=Behaviour(batch_s=0.5), grow_after_s=0.2, shrink_after_s=1.0)
    assert pool.overview().engines == []
    answers = [in_thread(lambda: pool.generate(REQUESTS, BASE, SAMPLING)) for _ in range(12)]
    wait_for(lambda: len(serving(pool)) == 3)
    assert pool.overview().queued > 0
    assert all(same(answer(), undisturbed()) for answer in answers)
    # what is released is counted later
    wait_for(lambda: sum(engine.rows for engine in pool.overview().engines) == 12 * len(REQUESTS))
    assert pool.overview().engines[0].tokens_per_s > 0
    wait_for(lambda: pool.overview().engines == [])
    done = pool.overview()
    assert (done.queued, done.target, done.gone) == (0, 0, [])
    assert 6.0 <= done.working_s <= done.serving_s  # twelve batches of half a second, whoever answered them


def test_engines_that_a_smaller_pool_ends_while_they_load_are_no_failure(start):
    pool = start(size=1, behaviour=Behaviour(start_s=1.0))
    for _ in range(4):
        pool.resize(4)
        pool.resize(1)
    pool.facts()
    wait_for(lambda: [engine.state for engine in pool.overview().engines] == ["serving"])
    assert same(pool.generate(REQUESTS, BASE, SAMPLING), undisturbed())


def test_an_engine_that_died_is_told_with_its_cause(start):
    pool = start(size=1)
    wait_for(lambda: serving(pool))
    victim = pool.overview().engines[0]
    os.kill(victim.pid, signal.SIGKILL)
    wait_for(lambda: pool.overview().gone)
    [(name, cause, ago)] = pool.overview().gone
    assert name == victim.name
    assert "died" in cause
    assert 0 <= ago < 30


def test_an_empty_pool_wakes_up_when_asked(start):
    pool = start(size=0)
    assert pool.overview().engines == []
    assert same(pool.generate(REQUESTS[:2], BASE, SAMPLING), undisturbed(REQUESTS[:2]))


def test_a_dead_dispatcher_starts_anew_and_loses_nothing(start):
    pool = start(size=1, behaviour=Behaviour(batch_s=1.0))
    pool.facts()
    answer = in_thread(lambda: pool.generate(REQUESTS, BASE, SAMPLING))
    wait_for(lambda: any(engine.batches for engine in pool.overview().engines))
    old = pool.overview().engines[0]
    ray.kill(pool._dispatcher, no_restart=False)
    assert same(answer(), undisturbed())
    assert pool.overview().engines[0].name != old.name
    wait_for(lambda: not alive(old.pid))


def test_a_row_is_not_blamed_for_engines_that_die_with_their_dispatcher(start):
    pool = start(size=1, behaviour=Behaviour(batch_s=1.5), request_tries=1)
    pool.facts()
    answer = in_thread(lambda: pool.generate(REQUESTS[:1], BASE, SAMPLING))
    for _ in range(3):
        wait_for(lambda: any(engine.batches for engine in pool.overview().engines))
        ray.kill(pool._dispatcher, no_restart=False)
        wait_for(lambda: not any(engine.batches for engine in pool.overview().engines))
    assert same(answer(), undisturbed(REQUESTS[:1]))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_the_tickets_of_a_dead_caller_are_dropped(start):
    pool = start(size=1)
    pool.facts()
    ray.get(pool._dispatcher.acquire.remote(5, 0, True))  # and never used: the pool would wait for ever
    assert same(pool.generate(REQUESTS[:1], BASE, SAMPLING), undisturbed(REQUESTS[:1]))


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
    wait_for(lambda: len(pool.overview().engines) == 1)
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
        wait_for(lambda: said)
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
    wait_for(lambda: any("otherwise than before" in line and "is replaced" in line for line in told))


def test_an_engine_that_dies_asleep_is_replaced_in_the_engines_turn_only(start):
    pool = start(size=1, behaviour=Behaviour(sleeps=True), colocate=True)
    pool.facts()
    [first] = serving(pool)
    pool.sleep()
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: not pool.overview().engines)
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
    wait_for(lambda: not pool.overview().engines)
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
    wait_for(lambda: any(engine.pid for engine in pool.overview().engines))
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
