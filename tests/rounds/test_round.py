"""Rounds are planned from a source, and their traces do not depend on the cut into shards."""

import json

import pyarrow as pa
import pytest
from in_process import brought, planned

from pipeline.errors import UserError
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.recipes import recipe
from pipeline.rounds.plan import Plan, read_plan, write_plan
from pipeline.rounds.round import evaluation_run, open_round, plan_round


def test_rounds_walk_through_the_source_and_a_rerun_meets_the_same_problems(tmp_path):
    first, second = planned(tmp_path), planned(tmp_path, number=1)
    assert not {i for s in first.shards.values() for i in s} & {i for s in second.shards.values() for i in s}
    assert open_round(first.store, first.run, "rounds", 1).shards == second.shards
    with pytest.raises(UserError, match="no round 5"):
        open_round(first.store, first.run, "rounds", 5)


def test_ids_and_traces_do_not_depend_on_the_cut_into_shards(tmp_path):
    coarse, fine = planned(tmp_path / "a"), planned(tmp_path / "b", "rollout.prompts_per_shard=1")
    traces = []
    for work in (coarse, fine):
        brought(work, "prompts", "rollout")
        tables = [
            work.store.read(e, ["trace_id", "response_tokens"])
            for _, e in sorted(work.store.entries(work.area, "rollout").items())
        ]
        traces.append(pa.concat_tables(tables).to_pylist())
    assert traces[0] == traces[1]
    assert len({row["trace_id"] for row in traces[0]}) == 8


def test_a_plan_for_the_same_problems_keeps_its_cut_into_shards(tmp_path):
    old = planned(tmp_path, "rollout.prompts_per_shard=4")
    again = plan_round(old.store, resolve(old.run, ["rollout.prompts_per_shard=1"]), "rounds", 0, 0, open_source(old.run.source))
    assert again.shards == old.shards
    write_plan(old.store, "rounds", 0, Plan(0, old.shards))  # of an early version, which names no source
    again = plan_round(old.store, resolve(old.run, ["rollout.prompts_per_shard=1"]), "rounds", 0, 0, open_source(old.run.source))
    assert again.shards == old.shards
    assert read_plan(old.store, "rounds", 0).source == open_source(old.run.source).fingerprint
    other = resolve(old.run, ["rollout.prompts_per_shard=1", "rollout.prompts_per_round=3"])
    assert len(plan_round(old.store, other, "rounds", 0, 0, open_source(old.run.source)).shards) == 3


def test_an_evaluation_has_a_shard_for_every_engine():
    run = evaluation_run(resolve(recipe("qwen3_4b"), []))
    assert (run.rollout.prompts_per_shard, run.rollout.group_size) == (8, 4)
    assert evaluation_run(recipe("demo")).rollout.prompts_per_shard == 32
    assert evaluation_run(resolve(recipe("demo"), ["evaluation.samples=100"])).rollout.prompts_per_shard == 1


def test_a_source_smaller_than_a_round_still_gives_distinct_traces(tmp_path):
    source = tmp_path / "three.jsonl"
    rows = [{"problem": f"{i}+1+1+1", "solution": "x", "answer": "1"} for i in range(3)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = planned(tmp_path / "run", f"source.uri={source}", "rollout.prompts_per_round=8")
    brought(work, "prompts", "rollout")
    entries = sorted(work.store.entries(work.area, "rollout").items())
    ids = [i for _, e in entries for i in work.store.read(e, ["trace_id"])["trace_id"].to_pylist()]
    assert len(ids) == len(set(ids)) == 16
