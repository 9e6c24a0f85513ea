"""Runs stages in the test's own process: the work of a Ray task for one shard, without Ray. Also tiny rounds on fake engines."""

from actors.fakes import FakeEngine
from pipeline.errors import EngineError
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.recipes import demo
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import evaluation_run, plan_round, with_engines
from pipeline.rounds.running import shard as one_shard
from pipeline.stages import EVALUATION, LABELS, MEASURE, PLAN, STAGES
from pipeline.store.directory import Store
from pipeline.store.folders import NEEDED

SETS = ["rollout.prompts_per_round=4", "rollout.prompts_per_shard=2", "rollout.group_size=2"]


def bring_up_to_date(work, stage, shard, problems=None, force=False):
    """Compute and commit one shard of one stage unless it is fresh. Returns its entry, and whether it was computed."""
    first = sum(len(rows) for name, rows in work.shards.items() if name < shard)
    return one_shard.bring_up_to_date(Inventory(work, whole=False), stage, shard, first, problems, force)


class Refusing(FakeEngine):
    """A fake engine that must not be asked."""

    def generate(self, requests, policy, sampling):
        raise EngineError("asked to generate", "test")

    def score(self, sequences, policy):
        raise EngineError("asked to score", "test")


def planned(tmp_path, *sets, engine=FakeEngine, number=0, policy=0):
    """A planned round of two shards in a run of its own, with an engine that answers."""
    run = resolve(demo(), [*SETS, *sets])
    store = Store(str(tmp_path))
    work = plan_round(store, run, "rounds", number, policy, open_source(run.source))
    fake = engine(run.model, run.engines.rollout, run.score)
    return with_engines(work, {"rollout": fake, "score": fake})


def brought(work, *stages, force=False):
    """The stages of every shard, without Ray; returns the names of those computed."""
    source = open_source(work.run.source)
    computed = []
    for name in stages or (*MEASURE, *LABELS):
        for shard, indices in work.shards.items():
            problems = source.rows(indices) if name == "prompts" else None
            entry, new = bring_up_to_date(work, STAGES[name], shard, problems, force)
            computed += [(name, shard)] if new else []
            assert entry == work.store.entry(work.area, name, shard)
    return computed


def evaluate(store, run, version):
    """Have fake engines answer the held-out problems for a policy, with the real stages around them."""
    held_out = evaluation_run(run)
    work = plan_round(store, held_out, "evals", version, version, open_source(held_out.source).without_solutions())
    fake = FakeEngine(run.model, run.engines.rollout, run.score)
    brought(with_engines(work, {"rollout": fake, "score": fake}), *EVALUATION)


def publish(store, version, folder):
    """A policy of bytes that no engine can open."""
    folder.mkdir(exist_ok=True)
    for name in NEEDED["policy"]:
        (folder / name).write_bytes(b"policy %d" % version)
    store.publish_policy(version, folder)


def stale(work):
    """Why shards are stale, by stage and shard. Fresh ones are left out."""
    return {
        (s.name, shard): why for s in PLAN for shard in work.shards if (why := Inventory(work, whole=False).why_stale(s, shard))
    }
