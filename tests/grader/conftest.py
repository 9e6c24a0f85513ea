"""Children of the grader whose processor time moves, however full the machine is."""

import itertools
from contextlib import suppress

import psutil
import pytest

from pipeline.grader import children


@pytest.fixture(autouse=True)
def only_the_stopped_stand_still(monkeypatch):
    """A process that works may get no processor for a minute, and would be taken for one that a test has stopped."""
    measured, rising = children._cpu_s, itertools.count()

    def cpu_s(pid):
        with suppress(psutil.Error):
            if psutil.Process(pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                return float(next(rising))
        return measured(pid)

    monkeypatch.setattr(children, "_cpu_s", cpu_s)
