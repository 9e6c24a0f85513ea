"""The choice of an engine: the same as a look at all of them would make, whatever has changed."""

import random
import time

from actors.pool.member import Member
from actors.pool.ready import Ready


def by_a_look_at_all(members, inflight):
    """The engine with the fewest rows among those with room; the oldest of equal ones."""
    free = [m for m in members if m.state == "serving" and not m.left and m.held_for is None and len(m.tickets) < inflight]
    return min(free, key=lambda member: (member.load, member.since), default=None)


def test_the_choice_is_that_of_a_look_at_all_engines():
    rng = random.Random(0)
    members, ready, inflight = [Member(str(i), None, since=float(i)) for i in range(7)], Ready(3), 3
    seen = set()
    for step in range(5000):
        member = rng.choice(members)
        match rng.randrange(6):
            case 0 | 1:
                if (chosen := ready.least()) is not None:
                    chosen.tickets[str(step)] = rng.randrange(1, 5)
                    ready.offer(chosen)
            case 2 | 3:
                if member.tickets:
                    member.tickets.pop(rng.choice(list(member.tickets)))
                    ready.offer(member)
            case 4:
                member.state = rng.choice(["loading", "serving", "draining", "serving", "asleep"])
                ready.offer(member)
            case _:
                member.held_for = None if member.held_for else rng.choice(["a ticket", None])
                ready.offer(member)
        ready.shrink(len(members))
        found = ready.least()
        assert found is by_a_look_at_all(members, inflight)
        seen.add(None if found is None else found.name)
    assert len(seen) == 8
    assert len(ready._heap) < 2 * len(members) + 70


def test_an_engine_that_has_left_is_never_chosen():
    ready = Ready(4)
    first, second = (Member(name, None, "serving", since=since) for name, since in (("a", 0.0), ("b", 1.0)))
    ready.offer(first)
    ready.offer(second)
    assert ready.least() is first
    first.left = True
    assert ready.least() is second


def test_an_engine_whose_batch_has_not_been_given_back_has_worked_until_now():
    """The word that a batch has ended may come late. A round that was measured meanwhile had engines at work for 0 s."""
    member = Member("a", None, "serving", since=0.0, serving_since=time.monotonic() - 9, busy_s=5.0)
    assert member.status().busy_s == 5.0
    member.tickets, member.busy_since = {"t": 1}, time.monotonic() - 2
    assert 7.0 <= member.status().busy_s < 7.5
