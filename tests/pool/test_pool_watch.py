"""Who is named to the person who waits: engines that are silent, load or are at one step, and no engine that works."""

from dataclasses import replace

from actors.pool.member import EngineStatus, PoolStatus
from actors.pool.pool_watch import words
from pipeline import config
from pipeline.notices import Sparing

CALM = EngineStatus("rollout-1", "serving", 7, 2, 10, 0, 900.0, 1.0, 100, 5.0)


def told(*engines, gone=(), fallback="", cannot_grow=""):
    status = PoolStatus(list(engines), 0, 1, 1, 1, list(gone), 0.0, 0.0, fallback, cannot_grow=cannot_grow)
    return {notice.kind: notice.text for notice in words(status, config.Pool(), "engines.rollout")}


def test_an_engine_that_works_or_was_silent_for_a_moment_is_not_named():
    assert told(CALM, replace(CALM, silent_s=29.0, step_s=29.0)) == {}


def test_a_silent_engine_is_named_with_what_will_happen():
    [text] = told(replace(CALM, silent_s=31.0)).values()
    assert text == "engines.rollout: no sign of life from engine rollout-1 for 31 s. It is replaced after 60 s."


def test_a_long_step_is_told_as_such_since_it_may_compile():
    [text] = told(replace(CALM, step_s=45.0)).values()
    assert "has been at one step for 45 s. A first step may compile. It is replaced after 600 s." in text


def test_loading_is_told_only_where_nobody_serves():
    loading = replace(CALM, state="loading", seconds=34.0)
    assert told(loading) == {
        "engines.rollout loading": "engines.rollout: engine rollout-1 has been loading for 34 s. A first start may compile."
    }
    assert told(loading, CALM) == {}
    assert "has waited 34 s for a place" in next(iter(told(replace(loading, pid=0)).values()))


def test_an_engine_that_was_replaced_for_its_silence_is_told_and_one_that_was_killed_is_not():
    gone = [("rollout-1", "gave no sign of life for 60 s", 1.0), ("rollout-2", "The actor died", 2.0)]
    [text] = told(CALM, gone=gone).values()
    assert text.startswith("engines.rollout: engine rollout-1 gave no sign of life for 60 s and is replaced.")


def test_each_fact_is_told_once_and_a_wait_once_a_minute_for_each_engine(caplog):
    """A look every two seconds wrote each line for as long as the run lasted: 7 MB a day."""
    now = 0.0
    told = Sparing(lambda: now)
    gone = [(f"rollout-{number}", "gave no sign of life for 60 s", 1.0) for number in (8, 9)]
    for look in range(90):  # three minutes
        now = 2.0 * look
        silent = [replace(CALM, name=f"rollout-{number}", silent_s=31.0 + now) for number in (1, 2)]
        status = PoolStatus(silent, 0, 1, 1, 1, gone, 0.0, 0.0, "scoring differs")
        for notice in words(status, config.Pool(), "engines.rollout"):
            told.tell(*notice)
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "bounds" in line] == lines[:1]
    assert [line.split()[2] for line in lines if "is replaced." in line] == ["rollout-8", "rollout-9"]
    waits = [line.partition("from engine ")[2].partition(". It")[0] for line in lines if "from engine" in line]
    assert waits == [f"rollout-{number} for {seconds} s" for seconds in (31, 91, 151) for number in (1, 2)]


def test_bounds_in_the_place_of_exact_entropies_are_told():
    [text] = told(CALM, fallback="scoring differs").values()
    assert text.startswith("warning: engines.rollout: entropies are bounds and not exact (scoring differs).")
    assert text.endswith("score.fallback=false ends such a run before it pays.")


def test_a_pool_that_goes_on_without_an_engine_tells_why():
    [text] = told(CALM, cannot_grow="no space left. Free some space").values()
    assert text.startswith("warning: engines.rollout: one more engine does not start. The pool goes on without it")
    assert text.endswith("(no space left. Free some space).")
