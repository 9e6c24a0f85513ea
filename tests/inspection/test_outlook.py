"""What a run would do, in figures that follow from its settings."""

from pipeline.inspection.outlook import departures, outlook
from pipeline.inspection.remaining import Remaining
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.recipes import demo
from pipeline.store.directory import Store


def test_the_work_of_a_new_run_is_counted(tmp_path):
    store, run = Store(str(tmp_path)), resolve(demo(), ["rounds=3", "rollout.prompts_per_round=10"])
    sources = open_source(run.source), open_source(run.evaluation.source)
    said = "\n".join(outlook(store, run, Remaining.of(store, run), sources))
    assert "is made anew: 3 rounds of recipe demo" in said
    assert "10 of 100000 problems" in said
    assert "= 80 traces of at most 72 tokens" in said
    assert "2 shards each" in said  # of 8 and 2 prompts
    assert "in all 240 traces, at most 17,280 tokens" in said  # 3 x 80 x 72
    assert said.count("answers 512 held-out problems") == 2
    assert not list(tmp_path.iterdir())


def test_only_settings_that_differ_are_listed():
    changed = departures(resolve(demo(), ["seed=5"]))
    assert changed["seed"] == 5
    assert "objective.name" not in changed
