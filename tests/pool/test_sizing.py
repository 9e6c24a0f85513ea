"""How many engines: grows with work that waits, shrinks when idle, neither at once nor beyond its bounds."""

from hypothesis import given
from hypothesis import strategies as st

from actors.pool.sizing import Bounds, Pace, Sizing, resize

PACE = Pace(grow_after_s=2.0, shrink_after_s=60.0)
BOUNDS = Bounds(1, 8)


def play(looks, bounds=BOUNDS, pace=PACE, start=1, per_engine=4):
    """Targets after each (seconds, batches)."""
    state, targets = Sizing(start), []
    for now, batches in looks:
        state = resize(state, batches, per_engine, bounds, pace, now)
        targets.append(state.target)
    return targets


def test_work_that_waits_long_enough_makes_it_grow_to_what_is_needed():
    assert play([(0, 4), (1, 17), (2, 17), (2.9, 17), (3, 17)]) == [1, 1, 1, 1, 5]


def test_a_burst_that_is_over_before_it_has_waited_changes_nothing():
    assert play([(0, 30), (1, 2), (2, 30), (3.5, 30)]) == [1, 1, 1, 1]


def test_an_empty_pool_starts_at_once_and_an_idle_one_ends_after_its_time():
    bounds = Bounds(0, 8)
    assert play([(0, 0), (1, 9)], bounds, start=0) == [0, 3]
    assert play([(0, 0), (59, 0), (60, 0)], bounds, start=3) == [3, 3, 0]


def test_it_shrinks_to_the_most_that_was_needed_meanwhile():
    assert play([(0, 3), (30, 11), (59, 0), (60, 0), (61, 0), (121, 0)], start=5) == [5, 5, 5, 3, 3, 1]


def test_need_that_comes_back_puts_off_the_shrinking():
    assert play([(0, 0), (50, 20), (60, 0), (110, 0), (120, 0)], start=5) == [5, 5, 5, 5, 1]


def test_other_bounds_hold_at_once():
    assert play([(0, 40)], Bounds(1, 2), start=7) == [2]
    assert play([(0, 0)], Bounds(4, 4), start=1) == [4]


looks = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 100)), max_size=50)
bounds_of = st.tuples(st.integers(0, 5), st.integers(0, 20)).map(lambda pair: Bounds(pair[0], max(1, sum(pair))))


@given(looks, bounds_of, st.integers(1, 9), st.integers(0, 30))
def test_it_never_leaves_its_bounds_nor_serves_work_with_nothing(steps, bounds, per_engine, start):
    now = 0.0
    state = Sizing(start)
    for passed, batches in steps:
        now += passed
        state = resize(state, batches, per_engine, bounds, PACE, now)
        assert bounds.least <= state.target <= bounds.most
        assert state.target > 0 or batches == 0


@given(looks, st.integers(1, 9))
def test_two_changes_in_opposite_directions_are_a_pace_apart(steps, per_engine):
    """No thrashing: what was started is not ended before it has been spare for the whole time."""
    now, grown, state = 0.0, None, Sizing(1)
    for passed, batches in steps:
        now += passed
        after = resize(state, batches, per_engine, BOUNDS, PACE, now)
        if after.target > state.target:
            grown = now
        if after.target < state.target and grown is not None:
            assert now - grown >= PACE.shrink_after_s
        state = after


@given(st.integers(0, 100), st.integers(1, 9))
def test_steady_work_finds_its_size_and_stays(batches, per_engine):
    sizes = play([(second, batches) for second in range(300)], per_engine=per_engine)
    assert set(sizes[100:]) == {min(max(-(-batches // per_engine), 1), 8)}
