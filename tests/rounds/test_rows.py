"""The rows that the trainer and the export get are those of the committed shards."""

from dataclasses import replace

import numpy as np
import pytest
from committed import round_table
from in_process import bring_up_to_date, brought, planned

from actors.fakes import FakeEngine
from pipeline.contract import TOPK
from pipeline.errors import StoreError
from pipeline.problems.sources import open_source
from pipeline.rounds import inventory
from pipeline.rounds.round import with_engines
from pipeline.rounds.rows import joined_round
from pipeline.stages import LABELS, MEASURE, PLAIN, STAGES


def test_a_round_of_nothing_but_rejected_rows_goes_through_and_is_counted(tmp_path):
    work = planned(tmp_path, "model.max_model_len=74")
    brought(work)
    inventory.commit_round(work)
    table = round_table(work.store, 0)
    assert table["reject_reason"].to_pylist() == ["prompt_too_long"] * 8
    for stage in PLAIN[1:]:
        assert sum(sum(e.rejected.values()) for e in work.store.entries(work.area, stage.name).values()) == 8


def test_the_trainer_gets_the_committed_shards_and_no_others(tmp_path):
    work = planned(tmp_path)
    with pytest.raises(StoreError, match="committed with a shard missing"):
        inventory.commit_round(work)
    assert round_table(work.store, 0) is None
    brought(work, *MEASURE)
    inventory.commit_round(work)
    table = round_table(work.store, 0)
    assert table.num_rows == 8
    assert {"prompt_tokens", "response_tokens", "teacher_entropy", "advantage"} <= set(table.column_names)
    brought(planned(tmp_path, "grade.beta_length=0", "grade.advantage=running"), "grade")
    with pytest.raises(StoreError, match="changed since its round was committed"):
        round_table(work.store, 0)


def test_the_joined_rows_have_nulls_where_a_stage_is_not_made_yet(tmp_path):
    work = planned(tmp_path, number=3)
    brought(work, *MEASURE)
    brought(work, *LABELS)
    work.store.delete(f"{work.area}/label/0001.json")
    table = joined_round(work)
    assert table.num_rows == 8
    assert set(table["round"].to_pylist()) == {3}
    assert table["token_weight"].is_null().to_pylist() == [False] * 4 + [True] * 4
    read = [work.store.read(work.store.entry(work.area, "rollout", shard)) for shard in ("0000", "0001")]
    assert table["trace_id"].to_pylist() == [i for part in read for i in part["trace_id"].to_pylist()]


def test_kept_tokens_are_joined_and_null_where_a_shard_is_older(tmp_path):
    old = planned(tmp_path)
    brought(old, *MEASURE)
    assert not set(TOPK) & set(joined_round(old).column_names)
    work = planned(tmp_path, "score.keep_topk=4")
    before = {name: work.store.entries(work.area, name) for name in ("prompts", "rollout", "grade")}
    source = open_source(work.run.source)
    bring_up_to_date(work, STAGES["score"], "0001", source.rows(work.shards["0001"]))
    table = joined_round(work)
    kept = table["teacher_topk_tokens"].to_pylist()
    assert kept[:4] == [None] * 4
    for ids, logprobs, tokens in zip(kept[4:], *(table[n].to_pylist()[4:] for n in (TOPK[1], "response_tokens")), strict=True):
        assert np.shape(ids) == np.shape(logprobs) == (len(tokens), 4)
    assert {name: work.store.entries(work.area, name) for name in before} == before
    assert brought(work, *MEASURE) == [("score", "0000")]
    assert joined_round(work)["teacher_topk_tokens"].null_count == 0


class Other(FakeEngine):
    """An engine that draws other tokens."""

    def generate(self, requests, policy, sampling):
        return super().generate([replace(request, seed=request.seed + 1) for request in requests], policy, sampling)


def test_what_was_made_from_traces_of_before_is_left_out_of_a_join(tmp_path):
    """A trace_id stays when a trace is written again. New tokens stood beside verdicts and log-probs of the old ones."""
    work = planned(tmp_path)
    brought(work)
    old = joined_round(work)
    assert old["verdict"].null_count == 0
    other = Other(work.run.model, work.run.engines.rollout, work.run.score)
    work = with_engines(work, {"rollout": other, "score": other})
    brought(work, "rollout", force=True)
    new = joined_round(work)
    assert new["trace_id"].equals(old["trace_id"])
    assert not new["response_tokens"].equals(old["response_tokens"])
    assert {"verdict", "student_logprobs", "teacher_entropy", "regime"}.isdisjoint(new.column_names)
    brought(work, "grade")
    assert joined_round(work)["verdict"].null_count == 0
