"""The pool of engine actors through real Ray, with the fake engine: answers, deaths and sizes."""

import os
import re
import signal

import pytest
import ray
from pools import BASE, REQUESTS, SAMPLING, in_thread, same, serving, undisturbed
from ray.exceptions import RayActorError
from waiting import until

from actors.fakes import Behaviour
from actors.pool.pool import Piece, after_death
from pipeline.config.machines import Client
from pipeline.contract import Failure, Generate, Policy, Sequence
from pipeline.errors import EngineError

pytestmark = pytest.mark.timeout(900)


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
    until(lambda: len(serving(pool)) == 2)

    def spread():
        answers = ray.get([ask_from_a_task.remote(pool, range(i * 10, i * 10 + 10)) for i in range(4)])
        assert same([row for answer in answers for row in answer], undisturbed())
        return min(engine.rows for engine in pool.overview().engines) >= 10

    until(spread, within=60, what="both engines answer")  # on a full machine a task may end before the next one begins


def test_a_killed_engine_is_replaced_and_its_batch_asked_again(start):
    pool = start(size=1, behaviour=Behaviour(batch_s=2.0))
    pool.facts()
    answer = in_thread(lambda: pool.generate(REQUESTS, BASE, SAMPLING))
    until(lambda: any(engine.batches for engine in pool.overview().engines))
    victim = pool.overview().engines[0]
    os.kill(victim.pid, signal.SIGKILL)
    assert same(answer(), undisturbed())
    until(lambda: victim.name not in names(pool))


def names(pool):
    return [engine.name for engine in pool.overview().engines]


def causes(pool):
    return [cause for _, cause, _ in pool.overview().gone]


def stop_and_recover(pool, pid_of):
    """Stop the process whose id `pid_of` tells while one batch is in an engine and one waits. All are answered all the same.

    A third batch is asked after the stop. On a loaded machine the first two may have been answered by then, and nobody would
    need the process that was stopped.
    """
    pool.facts()
    pid = pid_of()
    answers = [in_thread(lambda: pool.generate(REQUESTS, BASE, SAMPLING)) for _ in range(2)]
    until(lambda: pool.overview().queued and any(engine.batches for engine in pool.overview().engines))
    os.kill(pid, signal.SIGSTOP)
    answers.append(in_thread(lambda: pool.generate(REQUESTS, BASE, SAMPLING)))
    assert all(same(answer(), undisturbed()) for answer in answers)


def test_a_stopped_engine_is_replaced_and_its_batch_asked_again(start, told):
    pool = start(size=1, inflight=1, behaviour=Behaviour(batch_s=2.0), stall_timeout_s=4.0)
    stop_and_recover(pool, lambda: pool.overview().engines[0].pid)
    assert "gave no sign of life for 4 s" in causes(pool)
    until(lambda: any("gave no sign of life for 4 s and is replaced" in line for line in told))


def test_an_engine_that_is_stopped_while_it_loads_is_replaced(start):
    pool = start(size=1, behaviour=Behaviour(start_s=3.0), stall_timeout_s=4.0)
    until(lambda: any(engine.pid for engine in pool.overview().engines))
    os.kill(pool.overview().engines[0].pid, signal.SIGSTOP)
    assert pool.facts().engine == "fake"
    assert "an engine gave no sign of life for 4 s while it loaded" in causes(pool)


def test_a_stopped_dispatcher_is_replaced_and_batches_are_asked_again(start, told):
    pool = start(size=1, inflight=1, behaviour=Behaviour(batch_s=2.0), stall_timeout_s=4.0)
    stop_and_recover(pool, lambda: ray.get(pool._dispatcher.__ray_call__.remote(lambda _: os.getpid())))
    assert "engines.rollout: the stopped dispatcher is replaced" in told


def test_engines_that_are_busy_or_slow_are_left_alone(start, told):
    """A load and a batch that last longer than `stall_timeout_s` are signs of work, and not of a stop.

    The deadline is a tenth of the users'. With 2 s it passed at a load of 37, as Ray's workers give way to all other processes.
    """
    pool = start(size=1, behaviour=Behaviour(start_s=7.0, batch_s=7.0), stall_timeout_s=6.0)
    assert same(pool.generate(REQUESTS, BASE, SAMPLING), undisturbed())
    assert pool.overview().gone == []
    assert [line for line in told if "sign of life" in line or "replaced" in line] == []


def test_an_idle_engine_that_dies_is_replaced_unasked_and_told_with_its_cause(start):
    pool = start(size=1)
    pool.facts()
    until(lambda: serving(pool))
    victim = pool.overview().engines[0]
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: [e for e in serving(pool) if e.name != victim.name])
    assert victim.name not in names(pool)
    [(name, cause, ago)] = pool.overview().gone
    assert name == victim.name
    assert "died" in cause
    assert 0 <= ago < 300


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


def test_what_a_server_fails_at_is_no_death_of_its_client(start):
    """Its client has asked `tries` times. Once it was killed and asked again up to five times a row, and the rows were lost."""
    down = EngineError("the server gave no answer within 300 s, asked 4 times", "teachers.big, http://there", "Then resume")
    pool = start(size=1, behaviour=Behaviour(ask_error=down), kind=Client)
    until(lambda: serving(pool))
    [client] = pool.overview().engines
    for ask in (lambda: pool.generate(REQUESTS, BASE, SAMPLING), lambda: pool.score([Sequence([1], [7])], BASE)):
        with pytest.raises(EngineError, match=re.escape(str(down))):
            ask()
    until(lambda: not any(engine.batches for engine in pool.overview().engines))
    assert [engine.name for engine in pool.overview().engines] == [client.name]
    assert pool.overview().gone == []


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
    until(lambda: len(serving(pool)) == 2)
    old = {engine.name for engine in serving(pool)}
    ray.kill(pool._dispatcher, no_restart=False)
    until(lambda: len({engine.name for engine in serving(pool)} - old) == 2)
    assert (pool.overview().least, pool.overview().most) == (2, 3)


def test_resize_joins_after_load_and_drains_before_it_ends(start):
    pool = start(size=1, behaviour=Behaviour(batch_s=4.0, start_s=0.3), inflight=1)
    until(lambda: len(serving(pool)) == 1)
    pool.resize(3)
    assert len(pool.overview().engines) == 3
    until(lambda: len(serving(pool)) == 3)
    waiting = [in_thread(lambda: pool.generate(REQUESTS, BASE, SAMPLING)) for _ in range(3)]
    until(lambda: all(engine.batches == 1 for engine in pool.overview().engines))
    pool.resize(1)
    assert sorted(engine.state for engine in pool.overview().engines) == ["draining", "draining", "serving"]
    assert all(same(answer(), undisturbed()) for answer in waiting)
    until(lambda: len(pool.overview().engines) == 1)


def test_work_that_waits_makes_it_grow_and_idleness_shrinks_it(start):
    pool = start(size=0, most=3, inflight=1, behaviour=Behaviour(batch_s=0.5), grow_after_s=0.2, shrink_after_s=1.0)
    assert pool.overview().engines == []
    answers = [in_thread(lambda: pool.generate(REQUESTS, BASE, SAMPLING)) for _ in range(12)]

    def all_serve():
        seen = pool.overview()
        if seen.queued < 6:  # on a busy machine one may answer everything before all have loaded
            answers.append(in_thread(lambda: pool.generate(REQUESTS, BASE, SAMPLING)))
        at_work = seen.queued and any(engine.tokens_per_s > 0 for engine in seen.engines)
        return at_work and [engine.state for engine in seen.engines] == ["serving"] * 3

    until(all_serve)
    assert all(same(answer(), undisturbed()) for answer in answers)
    until(lambda: pool.overview().engines == [])
    done = pool.overview()
    assert (done.queued, done.target, done.gone) == (0, 0, [])
    assert len(answers) / 2 <= done.working_s <= done.serving_s  # batches of half a second, whoever answered them


def test_engines_that_a_smaller_pool_ends_while_they_load_are_no_failure(start):
    pool = start(size=1, behaviour=Behaviour(start_s=1.0))
    for _ in range(4):
        pool.resize(4)
        pool.resize(1)
    pool.facts()
    until(lambda: [engine.state for engine in pool.overview().engines] == ["serving"])
    assert same(pool.generate(REQUESTS, BASE, SAMPLING), undisturbed())


def test_an_empty_pool_wakes_up_when_asked(start):
    pool = start(size=0)
    assert pool.overview().engines == []
    assert same(pool.generate(REQUESTS[:2], BASE, SAMPLING), undisturbed(REQUESTS[:2]))


def test_a_dead_dispatcher_starts_anew_and_loses_nothing(start):
    pool = start(size=1, behaviour=Behaviour(batch_s=1.0))
    pool.facts()
    answer = in_thread(lambda: pool.generate(REQUESTS, BASE, SAMPLING))
    until(lambda: any(engine.batches for engine in pool.overview().engines))
    old = pool.overview().engines[0]
    ray.kill(pool._dispatcher, no_restart=False)
    assert same(answer(), undisturbed())
    until(lambda: (found := names(pool)) and old.name not in found)
    until(lambda: not alive(old.pid))


def test_a_row_is_not_blamed_for_engines_that_die_with_their_dispatcher(start):
    pool = start(size=1, behaviour=Behaviour(batch_s=5.0), request_tries=1)
    pool.facts()
    answer = in_thread(lambda: pool.generate(REQUESTS[:1], BASE, SAMPLING))
    for _ in range(2):
        until(lambda: any(engine.batches for engine in pool.overview().engines))
        ray.kill(pool._dispatcher, no_restart=False)
        until(lambda: not any(engine.batches for engine in pool.overview().engines))
    assert same(answer(), undisturbed(REQUESTS[:1]))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"
