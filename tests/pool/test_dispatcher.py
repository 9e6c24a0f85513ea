"""The dispatcher over actors that the test hands it, without Ray: deaths that real machines seldom show, and who is let in."""

import asyncio
import time
from dataclasses import replace

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from actors.fakes import FakeEngine
from actors.pool.asking import Actors
from actors.pool.dispatcher import Dispatcher
from actors.pool.member import Pulse
from actors.pool.probe import STRANGE
from actors.pool.sizing import Bounds
from pipeline import config
from pipeline.errors import EngineError, ModelError

ARGS = (FakeEngine, config.Model(), config.Pool(), config.ScoreSettings())
FACTS = FakeEngine(*ARGS[1:]).facts()
FULL = OutOfMemoryError("the node ran out of memory")


class Method:
    """A method of an actor, whose calls end in an error, or in an answer after some seconds."""

    def __init__(self, outcome, seconds=0.0):
        self.outcome, self.seconds = outcome, seconds

    async def remote(self, *_):
        await asyncio.sleep(self.seconds)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Handle:
    """An actor that loads and serves, unless its methods are given."""

    def __init__(self, **methods):
        self.pid, self.load, self.pulse, self.close = Method(7), Method(FACTS), Method(Pulse([], 0)), Method(None)
        self.probe, self.sleep, self.wake = Method({0: [-1.0, -2.0]}), Method(True), Method(None)
        self.__dict__.update(methods)


class Given(Actors):
    """Actors in the order given, and one that serves after the last. `ended` are those that were killed."""

    def __init__(self, *handles):
        self.handles, self.ended = list(handles), []
        self.others_hold_more, self.autoscaler = Method(False).remote, False

    def start(self, name, placement, inflight):
        return self.handles.pop(0) if self.handles else Handle()

    def nodes_may_come(self):
        return self.autoscaler

    def end(self, handle):
        self.ended.append(handle)


def dispatcher(actors, inflight=4, **settings):
    return Dispatcher("rollout", config.Pool(**settings), inflight, ARGS, actors)


async def until(pool, condition):
    """The pool's state once `condition` holds for it."""
    async with asyncio.timeout(300):
        while not condition(seen := await pool.overview()):
            await asyncio.sleep(0.01)
    return seen


def states(seen):
    return [engine.state for engine in seen.engines]


def test_an_engine_that_rays_memory_monitor_ends_is_dead(monkeypatch):
    """Its death is of a kind of its own, while it loads and while it serves; no real machine can be filled for a test."""
    monkeypatch.setattr("actors.pool.dispatcher._WATCH_S", 0.01)
    loading, serving, third = Handle(load=Method(FULL)), Handle(pulse=Method(FULL)), Handle()
    actors = Given(loading, serving, third)

    async def told():
        pool = dispatcher(actors)
        assert await pool.facts() == FACTS
        seen = await until(pool, lambda seen: len(seen.gone) == 2 and states(seen) == ["serving"])
        assert (await pool.acquire(1, 0, False)).handle is third
        return seen

    causes = [cause for _, cause, _ in asyncio.run(told()).gone]
    assert causes == ["its process died (the node ran out of memory)", "the node ran out of memory"]
    assert actors.ended == [loading, serving]


def test_an_engine_that_is_slow_to_start_ends_nothing_while_others_serve():
    slow = Handle(pid=Method(7, 0.2), load=Method(FACTS, 900))  # it waits for its machine, then takes too long to load
    actors = Given(Handle(), slow)

    async def told():
        pool = dispatcher(actors, start_timeout_s=0.05)
        await pool.facts()
        await pool.resize(Bounds(2, 2))
        return await until(pool, lambda seen: seen.gone and states(seen) == ["serving"] * 2)

    [(_, cause, _)] = asyncio.run(told()).gone
    assert cause == "an engine did not start within 0.05 s"
    assert actors.ended == [slow]


def test_an_engine_that_is_slow_to_start_ends_a_pool_without_others():
    async def told(slow):
        await asyncio.wait_for(dispatcher(Given(slow), start_timeout_s=0.05).facts(), 300)

    for slow in (Handle(load=Method(FACTS, 900)), Handle(pid=Method(7, 900))):
        with pytest.raises(EngineError, match=r"did not start within 0\.05 s"):
            asyncio.run(told(slow))


def test_an_engine_waits_for_its_place_while_other_pools_hold_more_than_they_keep():
    actors, held = Given(Handle(pid=Method(7, 0.5))), iter([True] * 4)  # one has just ended when the time is over again
    actors.others_hold_more = lambda: Method(next(held, False)).remote()
    assert asyncio.run(dispatcher(actors, start_timeout_s=0.11).facts()) == FACTS


def test_an_engine_waits_for_a_machine_of_the_autoscaler_for_longer_than_a_start_may_take(monkeypatch):
    """The only rollout node, a spot machine, was lost: the run ended unless another one was set up within start_timeout_s."""
    lost = RayActorError()
    lost.error_msg = "The actor died because its node has died."

    async def told(autoscaler):
        waits = Handle(pid=Method(7, 0.5))
        actors = Given(Handle(load=Method(lost)), waits)
        actors.autoscaler = autoscaler
        pool = dispatcher(actors, start_timeout_s=0.1)
        await asyncio.wait_for(pool.facts(), 300)
        return (await pool.acquire(1, 0, False)).handle is waits

    assert asyncio.run(told(True))
    monkeypatch.setattr("actors.pool.asking.PLACE_S", 0.2)
    with pytest.raises(EngineError, match=r"did not start within 0\.2 s: the cluster has no place for it"):
        asyncio.run(told(True))
    with pytest.raises(EngineError, match=r"did not start within 0\.1 s: the cluster has no place for it"):
        asyncio.run(told(False))


def test_a_placement_that_ray_refuses_ends_the_pool_with_that_error():
    class Refuses(Given):
        def start(self, name, placement, inflight):
            raise ValueError("no such resource")

    async def told():
        return await asyncio.wait_for(dispatcher(Refuses()).facts(), 300)

    with pytest.raises(EngineError, match=r"rollout\.placement: engines cannot be asked for \(ValueError: no such resource"):
        asyncio.run(told())


NO_ROOM = RayTaskError("load", "a traceback", ModelError("no space left", "model.path", "Free some space"))


@pytest.mark.parametrize("scaled", [Bounds(8, 8), Bounds(2, 8)])
def test_a_pool_that_has_the_engines_it_needs_goes_on_when_more_cannot_start(monkeypatch, scaled):
    """Six engines of a node whose disk is full failed within a second, and the run ended although none was needed."""
    monkeypatch.setattr("actors.pool.starts.PAUSE_S", 1.0)
    actors = Given(Handle(), Handle(), *(Handle(load=Method(NO_ROOM)) for _ in range(12)))

    async def told():
        pool = dispatcher(actors, min=2, max=8, grow_after_s=0.0)
        await until(pool, lambda seen: states(seen) == ["serving"] * 2)
        await pool.resize(scaled)
        waiting = [asyncio.create_task(pool.acquire(1, 0, False)) for _ in range(32)]  # they fill eight engines
        seen = await until(pool, lambda seen: len(actors.ended) == 6)
        assert states(seen) == ["serving"] * 2
        assert "no space left. Free some space" in seen.cannot_grow
        await asyncio.sleep(0.2)
        assert len(actors.ended) == 6  # it pauses
        seen = await until(pool, lambda seen: states(seen) == ["serving"] * 8)  # after a second pause there is room
        assert len(actors.ended) == 12
        await asyncio.wait_for(asyncio.gather(*waiting), 300)
        return seen.cannot_grow

    assert asyncio.run(told()) == ""


def test_engines_of_one_node_that_fail_together_are_one_failed_try():
    broken = RayTaskError("load", "a traceback", ValueError("no room"))

    async def told(tries):
        pool = dispatcher(Given(Handle(), *(Handle(load=Method(broken, 0.05)) for _ in range(7 * tries))), min=8, max=8)
        await until(pool, lambda seen: len(seen.gone) == 8)  # those that are remembered
        await asyncio.sleep(0.3)
        await asyncio.wait_for(pool.facts(), 300)  # raises the error that ended the pool
        return states(await pool.overview())

    assert asyncio.run(told(2)) == ["serving"] * 8
    with pytest.raises(EngineError, match="3 engines could not be loaded, the last one because ValueError: no room"):
        asyncio.run(told(3))


def test_a_batch_that_ends_lets_one_caller_in_and_an_engine_that_joins_all_it_has_room_for():
    async def told():
        pool = dispatcher(Given(), inflight=2)
        await pool.facts()
        waiting = [asyncio.create_task(pool.acquire(1, 0, False)) for _ in range(6)]
        counts = []

        async def count():
            for _ in range(50):
                await asyncio.sleep(0)
            counts.append(sum(task.done() for task in waiting))

        await count()
        await pool.release(waiting[0].result().id, 1, 1)
        await count()
        await pool.resize(Bounds(2, 2))
        await until(pool, lambda seen: states(seen) == ["serving"] * 2)
        await count()
        alone = asyncio.create_task(pool.acquire(1, 0, True))
        for task in waiting[1:5]:
            await pool.release(task.result().id, 1, 1)
        await count()
        await pool.release(waiting[5].result().id, 1, 1)
        await asyncio.wait_for(alone, 300)
        return counts

    assert asyncio.run(told()) == [2, 3, 5, 6]


class Pulses:
    """A sign of life with each call: as many steps as `steps` says, then the last one again."""

    def __init__(self, tickets, steps):
        self.tickets, self.steps = tickets, list(steps)

    async def remote(self):
        return Pulse(self.tickets(), self.steps.pop(0) if len(self.steps) > 1 else self.steps[0])


def watched(handle, seconds, **settings):
    """The engines that a pool has lost after it gave a batch to an engine with this handle, and waited some seconds."""

    async def told():
        pool = dispatcher(Given(handle), **settings)
        await pool.facts()
        handle.tickets.append((await pool.acquire(1, 0, False)).id)
        end = time.monotonic() + seconds
        while not (seen := await pool.overview()).gone and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return [cause for _, cause, _ in seen.gone]

    return asyncio.run(told())


def busy(steps):
    """A handle whose pulse tells of a batch and of these steps."""
    tickets = []
    handle = Handle(pulse=Pulses(lambda: tickets, steps))
    handle.tickets = tickets
    return handle


def test_an_engine_that_holds_a_batch_and_makes_no_step_for_as_long_as_a_start_may_take_is_replaced(monkeypatch):
    monkeypatch.setattr("actors.pool.dispatcher._WATCH_S", 0.01)
    [cause] = watched(busy([3]), 300, start_timeout_s=0.3)
    assert cause.startswith("made no step for")


def test_an_engine_that_makes_steps_is_left_alone_however_long_its_batch_takes(monkeypatch):
    monkeypatch.setattr("actors.pool.dispatcher._WATCH_S", 0.01)
    assert watched(busy(range(10_000)), 1.5, start_timeout_s=0.5, stall_timeout_s=0.5) == []


def test_an_engine_that_answers_late_but_before_the_deadline_is_left_alone(monkeypatch):
    monkeypatch.setattr("actors.pool.dispatcher._WATCH_S", 0.01)
    slow = Handle(pulse=Method(Pulse([], 0), 0.5))
    slow.tickets = []
    assert watched(slow, 2, stall_timeout_s=30.0) == []


def test_the_tickets_of_a_dead_caller_are_dropped(monkeypatch):
    monkeypatch.setattr("actors.pool.dispatcher._WATCH_S", 0.01)
    monkeypatch.setattr("actors.pool.dispatcher._FORGET_S", 0.05)

    async def told():
        pool = dispatcher(Given())
        await pool.facts()
        dead = await pool.acquire(5, 0, True)  # and never used: the pool would wait for ever
        return dead.engine == (await asyncio.wait_for(pool.acquire(1, 0, False), 300)).engine

    assert asyncio.run(told())


def test_engines_that_fell_back_for_reasons_that_read_otherwise_serve_together():
    gaps = [replace(FACTS, entropy_method="bounds", fallback=f"differs by {gap} nat") for gap in (0.73, 0.71)]
    actors = Given(*(Handle(load=Method(facts)) for facts in gaps))

    async def told():
        pool = dispatcher(actors, min=2, max=2)
        seen = await until(pool, lambda seen: states(seen) == ["serving", "serving"])
        await pool.close()
        return seen.fallback

    assert asyncio.run(told()) in {facts.fallback for facts in gaps}


# ---- a card that engine and trainer share ----------------------------------------------------------------------------

DEAD = RayActorError()


def shared(*handles, **settings):
    """A pool on a shared card, and its actors."""
    actors = Given(*handles)
    return dispatcher(actors, colocate=True, **settings), actors


async def served(pool):
    """The pool once one engine serves."""
    await pool.wake()
    assert await pool.facts() == FACTS
    return await until(pool, lambda seen: states(seen) == ["serving"])


def test_a_pool_on_a_shared_card_starts_nothing_before_it_is_its_turn():
    async def told():
        pool, actors = shared(Handle())
        waiting = asyncio.create_task(pool.acquire(1, 0, False))
        seen = await pool.overview()
        await asyncio.sleep(0.6)  # the pool looks at its size four times a second
        assert (states(await pool.overview()), seen.asleep, len(actors.handles)) == ([], True, 1)
        await served(pool)
        return (await asyncio.wait_for(waiting, 300)).engine, (await pool.overview()).asleep

    engine, asleep = asyncio.run(told())
    assert engine.startswith("rollout-")
    assert not asleep


def test_a_pool_sleeps_once_its_batches_have_ended_and_takes_none_until_it_is_woken():
    async def told():
        handle = Handle()
        pool, actors = shared(handle)
        await served(pool)
        ticket = await pool.acquire(1, 0, False)
        sleeping = asyncio.create_task(pool.sleep())
        later = asyncio.create_task(pool.acquire(1, 0, False))
        await asyncio.sleep(0.1)
        assert not sleeping.done()
        await pool.release(ticket.id, 1, 1)
        await asyncio.wait_for(sleeping, 300)
        seen = await pool.overview()
        assert (states(seen), seen.asleep, later.done()) == (["asleep"], True, False)
        before = seen.serving_s
        await asyncio.sleep(0.2)
        assert (await pool.overview()).serving_s == pytest.approx(before, abs=0.1)  # seconds of sleep are no idle ones
        await pool.wake()
        assert (await asyncio.wait_for(later, 300)).handle is handle
        return actors.ended, (await pool.overview()).gone

    assert asyncio.run(told()) == ([], [])


@pytest.mark.parametrize(
    ("method", "cause"),
    [
        ({"probe": "flat"}, f"{STRANGE}: log-probs of policy 0 differ by 3.04 nat"),
        ({"wake": Method(DEAD)}, f"did not wake up ({DEAD})"),
        ({"wake": Method(None, 900)}, "did not wake up (TimeoutError)"),
    ],
)
def test_a_woken_engine_that_answers_otherwise_or_not_at_all_is_replaced_before_any_answer_counts(method, cause):
    class Flat:
        """The probe of an engine that answers -log V on every token after its sleep."""

        def __init__(self):
            self.calls = 0

        async def remote(self):
            self.calls += 1
            return {0: [-4.04, -4.04] if self.calls > 2 else [-1.0, -2.0]}

    async def told():
        first, second = Handle(**{name: Flat() if found == "flat" else found for name, found in method.items()}), Handle()
        pool, actors = shared(first, second, start_timeout_s=0.5)
        await served(pool)
        await pool.sleep()
        await pool.wake()
        assert (await asyncio.wait_for(pool.acquire(1, 0, False), 300)).handle is second
        assert actors.ended == [first]
        return (await pool.overview()).gone

    [(_, told_cause, _)] = asyncio.run(told())
    assert told_cause == cause


def test_an_engine_that_cannot_sleep_is_ended_and_another_starts_when_the_pool_is_woken():
    async def told():
        first, second = Handle(sleep=Method(False)), Handle()
        pool, actors = shared(first, second)
        await served(pool)
        await pool.sleep()
        assert (states(await pool.overview()), actors.ended) == ([], [first])
        await served(pool)
        assert (await pool.acquire(1, 0, False)).handle is second
        return (await pool.overview()).gone

    assert asyncio.run(told()) == []  # nobody has died


def test_an_engine_that_is_still_loading_when_the_trainers_turn_comes_is_ended():
    async def told():
        slow, second = Handle(load=Method(FACTS, 900)), Handle()
        pool, actors = shared(slow, second)
        await pool.wake()
        await until(pool, lambda seen: states(seen) == ["loading"])
        await pool.sleep()
        assert (states(await pool.overview()), actors.ended) == ([], [slow])
        return (await served(pool)).gone

    assert asyncio.run(told()) == []


def test_an_engine_that_dies_asleep_is_not_replaced_before_the_pool_is_woken(monkeypatch):
    monkeypatch.setattr("actors.pool.dispatcher._WATCH_S", 0.01)

    async def told():
        first, second = Handle(), Handle()
        pool, actors = shared(first, second)
        await served(pool)
        await pool.sleep()
        first.pulse = Method(DEAD)
        seen = await until(pool, lambda seen: seen.gone)
        await asyncio.sleep(0.6)
        assert (states(await pool.overview()), len(actors.handles)) == ([], 1)
        await served(pool)
        return [cause for _, cause, _ in seen.gone]

    assert asyncio.run(told()) == [str(DEAD)]


def test_new_engines_that_answer_otherwise_than_the_one_before_end_the_pool_after_three():
    async def told():
        strange = [Handle(probe=Method({0: [-1.0, -2.5]})) for _ in range(3)]
        pool, _ = shared(Handle(sleep=Method(False)), *strange)
        await served(pool)
        await pool.sleep()
        await pool.wake()
        await asyncio.wait_for(pool.acquire(1, 0, False), 300)

    what = f"3 engines could not be loaded, the last one because a new engine {STRANGE}: log-probs of policy 0 differ by 0.5"
    with pytest.raises(EngineError, match=what):
        asyncio.run(told())


def test_a_pool_that_has_failed_tells_the_driver_when_it_is_put_to_sleep():
    async def told():
        pool, _ = shared(Handle(load=Method(ValueError("no model"))))
        await pool.wake()
        await pool.sleep()  # nothing holds the card: the next batch gets the error
        await asyncio.wait_for(pool.acquire(1, 0, False), 300)

    with pytest.raises(EngineError, match="no model"):
        asyncio.run(told())


def test_every_line_of_an_unknown_error_reaches_the_caller():
    async def told():
        error = RayTaskError("load", "a traceback", ValueError("no room\nin the cache of 2 GiB"))
        await asyncio.wait_for(dispatcher(Given(Handle(load=Method(error))), min=1).acquire(1, 0, False), 300)

    with pytest.raises(EngineError, match=r"ValueError: no room in the cache of 2 GiB"):
        asyncio.run(told())
