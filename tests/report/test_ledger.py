"""Rows from the source to the loss where stages were done anew, or reject the same row, or an objective leaves writers out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from in_process import brought, planned
from report_runs import hostile_run

from actors.fakes import FakeEngine
from pipeline.contract import Failure
from pipeline.errors import UserError
from pipeline.overrides import resolve
from pipeline.report import collect
from pipeline.rounds.round import with_engines
from pipeline.rounds.rows import joined_round
from pipeline.stages import STAGES
from pipeline.store.manifest import Origin


class Shifted(FakeEngine):
    """An engine that draws other tokens."""

    def generate(self, requests, policy, sampling):
        return super().generate([replace(request, seed=request.seed + 1) for request in requests], policy, sampling)


def collected(store):
    """Everything the page shows of a run."""
    return collect.collect(store, store.load_run())


def test_new_traces_do_not_stand_beside_what_was_made_of_old_ones(tmp_path):
    """A trace_id stays when its trace is written again: new tokens were drawn with verdicts and signals of the old ones."""
    work = planned(tmp_path / "run")
    work.store.save_run(work.run, {})
    brought(work)
    before = collected(work.store)
    other = Shifted(work.run.model, work.run.engines.rollout, work.run.score)
    work = with_engines(work, {"rollout": other, "score": other})
    brought(work, "rollout", force=True)
    with pytest.raises(UserError, match="no round has graded and scored traces"):
        collected(work.store)
    brought(work, "grade", "score")
    now = collected(work.store)
    assert (now["rounds"][0]["traces"], now["sample"]["labelled"]) == (before["rounds"][0]["traces"], 0)
    assert [check["ok"] for check in now["ledger"]["total"]["checks"][:3]] == [True] * 3


def test_a_row_that_two_stages_reject_counts_once(tmp_path):
    """Three verifier errors that `score` rejects too were six, and the ledger said that rows were lost."""
    store, _ = hostile_run(tmp_path)
    entry = store.entry("rounds/0000", "score", "0000")
    table, graded = store.read(entry), store.read(store.entry("rounds/0000", "grade", "0000"))
    place = table.schema.get_field_index("reject_reason")
    reasons = ["no_context" if reason else None for reason in graded["reject_reason"].to_pylist()]
    again = table.set_column(place, table.schema.field(place), pa.array(reasons, pa.string()))
    store.commit("rounds/0000", STAGES["score"], "0000", again, Origin(facts=entry.facts))
    total = collected(store)["ledger"]["total"]
    assert [check["ok"] for check in total["checks"][:3]] == [True] * 3
    assert total["rejected"] == {"grade": {"verifier_error": 1}}


class Dropping(FakeEngine):
    """An engine that can score no first trace of a batch."""

    def score(self, sequences, policy):
        return [Failure("lost"), *super().score(sequences, policy)[1:]]


def test_a_trace_that_no_teacher_could_score_has_no_share_in_the_figures(tmp_path):
    """It has log-probs of the student alone: the report paired them with the next trace's, and ended with a traceback."""
    work = planned(tmp_path / "run", "rollout.prompts_per_round=6", engine=Dropping)
    work.store.save_run(work.run, {})
    brought(work)
    total = collected(work.store)
    [figures] = total["rounds"]
    assert total["ledger"]["total"]["rejected"]["score"].keys() == {"engine_error"}
    tables = joined_round(work)
    live = tables.filter(pc.is_null(tables["reject_reason"]))
    parts = (np.concatenate(live[name].to_pylist()) for name in ("teacher_logprobs", "student_logprobs"))
    assert figures["delta"] == pytest.approx(np.abs(np.subtract(*parts)).mean(), rel=1e-5)


def test_traces_that_the_objective_may_not_learn_from_are_no_lost_rows(tmp_path):
    store, _ = hostile_run(tmp_path)
    run = resolve(store.load_run(), ["rollout.teacher_share=0.5", "objective.name=sft"])
    store.save_run(run, {})
    entry = store.entry("rounds/0000", "rollout", "0000")
    table = store.read(entry)
    place = table.schema.get_field_index("trace_source")
    again = table.set_column(place, table.schema.field(place), pa.array(["student", "teacher"] * 4, pa.string()))
    store.commit("rounds/0000", STAGES["rollout"], "0000", again, Origin(facts=entry.facts))
    found = collected(store)["ledger"]["total"]
    assert found["unused"] == 4


def test_rounds_of_another_group_size_add_up(tmp_path):
    """A run went on with half the traces per prompt: its first rounds "did not add up", at 8 traces of 4 expected ones."""
    work = planned(tmp_path / "run", "rollout.group_size=4")
    brought(work)
    run = resolve(work.run, ["rollout.group_size=2"])
    later = replace(planned(tmp_path / "run", number=1), run=run)
    brought(later)
    work.store.save_run(run, {})
    found = collected(work.store)["ledger"]
    assert [(part["expected"], part["traces"]) for part in found["rounds"]] == [(16, 16), (8, 8)]
    assert (found["total"]["checks"][1]["ok"], found["adds_up"], found["group_sizes"]) == (True, True, [2, 4])


def test_a_lost_trace_of_earlier_settings_is_told(tmp_path):
    store, _ = hostile_run(tmp_path)
    entry = store.entry("rounds/0000", "rollout", "0000")
    table = store.read(entry)
    place = table.schema.get_field_index("sample_index")
    numbers = pa.array([0, 1, 2, 4] * 2, pa.int32())  # number 3 of each group is not there
    again = table.set_column(place, table.schema.field(place), numbers)
    store.commit("rounds/0000", STAGES["rollout"], "0000", again, Origin("earlier", facts=entry.facts))
    total = collected(store)["ledger"]["total"]
    assert (total["expected"], total["traces"], total["checks"][1]["ok"]) == (10, 8, False)
