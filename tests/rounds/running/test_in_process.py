"""A few shards in threads of this process: in streams, with their errors, without Ray, and without waiting at the end."""

import subprocess
import sys
import threading
from functools import partial

import pytest
from in_process import Refusing, planned, stale

from actors.fakes import Behaviour, FakeEngine
from pipeline.errors import EngineError
from pipeline.problems.sources import open_source
from pipeline.rounds.round import with_engines
from pipeline.rounds.running import in_process
from pipeline.rounds.running.schedule import Choice, execute, takes_ray
from pipeline.stages import LABELS, MEASURE

EIGHT = "rollout.prompts_per_round=16"  # eight shards


class Counting(FakeEngine):
    """A fake engine that notes how many batches it has at one time."""

    now = most = 0
    lock = threading.Lock()

    def generate(self, requests, policy, sampling):
        with self.lock:
            Counting.now += 1
            Counting.most = max(Counting.most, Counting.now)
        try:
            return super().generate(requests, policy, sampling)
        finally:
            with self.lock:
                Counting.now -= 1


def test_shards_wait_on_engines_at_one_time_and_a_second_time_nothing_is_computed(tmp_path):
    Counting.most = 0
    work = planned(tmp_path, EIGHT, engine=partial(Counting, behaviour=Behaviour(batch_s=0.2)))
    seen = []
    execute(work, MEASURE, open_source(work.run.source), inflight=3, on_entry=lambda entry, new: seen.append(new))
    execute(work, LABELS, on_entry=lambda entry, new: seen.append(new))
    assert seen == [True] * 8 * 6
    assert 1 < Counting.most <= 3
    assert stale(work) == {}
    seen.clear()
    execute(work, (*MEASURE, *LABELS), open_source(work.run.source), on_entry=lambda entry, new: seen.append(new))
    assert seen == [False] * 8 * 6


def test_the_error_of_a_stage_is_raised_and_no_thread_begins_another_shard(tmp_path):
    work = planned(tmp_path, EIGHT)
    execute(work, ("prompts",), open_source(work.run.source))
    refusing = Refusing(work.run.model, None, work.run.score)
    with pytest.raises(EngineError, match="asked to generate"):
        execute(with_engines(work, {"rollout": refusing}), ("rollout",), inflight=1)
    assert not work.store.entries(work.area, "rollout")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("error", [ZeroDivisionError, IndexError])  # an IndexError of a stage once ended its thread in silence
def test_an_error_that_is_not_of_the_project_is_raised_too(tmp_path, monkeypatch, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(in_process, "bring_item", broken)
    work = planned(tmp_path)
    with pytest.raises(error):
        execute(work, ("prompts",), open_source(work.run.source))


def test_stages_without_engines_take_no_ray(tmp_path):
    work = planned(tmp_path)
    assert not takes_ray(work.run, ("grade",), 16)
    assert takes_ray(work.run, ("grade",), 17)
    assert takes_ray(work.run, ("rollout",), 1)
    code = f"""
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from in_process import planned
from pipeline.problems.sources import open_source
from pipeline.rounds.running.schedule import execute
work = planned(Path({str(tmp_path)!r}))
execute(work, ("prompts",), open_source(work.run.source))
print(sorted({{"ray", "vllm"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]


def test_a_long_round_has_its_few_problems_read_here(tmp_path):
    work = planned(tmp_path, "shards_here=1")
    execute(work, ("prompts",), open_source(work.run.source))
    assert list(work.store.entries(work.area, "prompts")) == ["0000", "0001"]


def test_only_the_chosen_shards_are_computed(tmp_path):
    work = planned(tmp_path)
    execute(work, ("prompts",), open_source(work.run.source), choice=Choice(frozenset({"0001"})))
    assert list(work.store.entries(work.area, "prompts")) == ["0001"]
