"""Runs of fake engines whose verdicts differ: the last digit of a trace is its answer, so some groups have a signal."""

from dataclasses import replace

from in_process import brought

from actors.fakes import FakeEngine
from pipeline.choice.plans import Planner
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.recipes import demo
from pipeline.rounds.round import with_engines
from pipeline.stages import MEASURE
from pipeline.store.directory import Store

SETS = [
    *("rollout.prompts_per_round=4", "rollout.prompts_per_shard=2", "rollout.group_size=8", "evaluation.problems=0"),
    *(r"grade.answer_pattern=(\d)", "grade.beta_length=0", "source.size=200"),
]


class Killed(Exception):
    """Stands for a SIGKILL at a moment that a test chooses."""


def run_at(folder, *sets):
    """(store, run) of a folder."""
    store, run = Store(str(folder)), resolve(demo(), [*SETS, *sets])
    store.save_run(run, {})
    return store, run


def planner_of(store, run):
    return Planner(store, run, open_source(run.source))


def measured(planner, work, kill=None, engine=None):
    """A planned round that is brought up to date and filled, as the driver does it. A fake engine answers, or `engine`.

    `kill` is the number of shards that are computed until the process dies, counted over all stages.
    """
    pool = engine or FakeEngine(planner.run.model, planner.run.engines.rollout, planner.run.score)
    while True:
        for name in MEASURE:
            for shard, indices in work.shards.items():
                if kill is not None and kill[0] == 0:
                    raise Killed
                until_here = {one: rows for one, rows in work.shards.items() if one < shard} | {shard: indices}
                first = replace(with_engines(work, {"rollout": pool, "score": pool}), shards=until_here)
                done = brought(first, name)
                if kill is not None:
                    kill[0] -= bool(done)
        longer = planner.extended(work)
        if longer is None:
            return work
        work = longer


def bytes_of(store):
    """The content of every plan and every shard of a run."""
    root = store.local_root
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob("rounds/**/*.*")) if _is_result(path)}


def _is_result(path):
    return path.suffix == ".parquet" or path.name == "plan.json"
