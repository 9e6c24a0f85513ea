"""plan.json: whether a stored plan is the one that is wanted."""

import pytest

from pipeline.rounds.plan import Plan


@pytest.mark.parametrize(
    ("plan", "without_source", "with_source"),
    [
        (Plan(0, {}, "a", 8), True, True),
        (Plan(0, {}, "a", 9), False, False),
        (Plan(0, {}, "b", 8), True, False),
        (Plan(0, {}, "a", None), True, False),
        (Plan(0, {}, None, None), True, False),
    ],
)
def test_a_plan_is_for_its_number_of_prompts_and_its_source(plan, without_source, with_source):
    assert plan.is_for(8) is without_source
    assert plan.is_for(8, "a") is with_source
