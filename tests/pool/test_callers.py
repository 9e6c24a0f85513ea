"""Who waits for a pool, and who is let in."""

import asyncio

import pytest

from actors.pool.callers import Callers
from pipeline.errors import EngineError


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


def test_those_in_line_are_let_in_one_by_one_and_a_change_wakes_everybody_else():
    async def told():
        callers = Callers(None)
        line = [asyncio.create_task(callers.change(in_line=True)) for _ in range(3)]
        other = asyncio.create_task(callers.change())
        await settled()
        assert len(callers) == 3
        callers.notify(1)
        await settled()
        assert [task.done() for task in (*line, other)] == [True, False, False, True]
        callers.notify()
        await settled()
        return all(task.done() for task in line)

    assert asyncio.run(told())


def test_the_first_error_reaches_who_waits_and_who_comes_later():
    async def told():
        callers = Callers(None)
        waiting = [asyncio.create_task(callers.change(in_line=in_line)) for in_line in (True, False)]
        await settled()
        callers.fail(EngineError("first"))
        callers.fail(EngineError("second"))
        for caller in (*waiting, callers.change()):
            with pytest.raises(EngineError, match="first"):
                await caller

    asyncio.run(told())


def test_a_cancelled_caller_takes_nobodys_turn():
    """Room for one went to a caller that was gone, and the next one waited beside a free engine."""

    async def waits():
        callers = Callers(None)
        gone, here = (asyncio.create_task(callers.change(in_line=True)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        callers.notify(1)
        await asyncio.wait_for(here, 300)

    asyncio.run(waits())
