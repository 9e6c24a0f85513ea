"""The phase of an engine's process comes with each sign of life."""

from actors.inference import phase
from actors.pool.member import EngineActor, Member


def test_a_sign_of_life_carries_the_phase():
    member, actor = Member("rollout-0", None), EngineActor()
    phase.enter(phase.WEIGHTS)
    try:
        member.beat(actor.pulse())
        assert member.status().phase == phase.WEIGHTS
    finally:
        phase.enter("")
    member.beat(actor.pulse())
    assert member.status().phase == ""
