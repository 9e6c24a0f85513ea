"""What the page shows of a run beside its traces: evaluations of others, and rows that were rejected."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from report_runs import END, add_round, byte_tokenizer, evaluated, hostile_run, new_run

from pipeline.errors import UserError
from pipeline.overrides import resolve
from pipeline.report import collect, figures
from pipeline.report.held_out import Evaluations
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import open_rounds
from pipeline.store.directory import Store


def collected(store):
    """Everything the page shows of a run."""
    return collect.collect(store, store.load_run())


def test_an_evaluation_of_the_base_is_told_beside_that_of_the_last_policy(stored_run, tmp_path):
    """Policy 0 has no folder of its own, so `evaluate --policy 0,last` stood there with its second half alone."""
    store = Store(str(shutil.copytree(stored_run.uri, tmp_path / "run")))
    figures_ = {"avg": {"value": 0.5, "low": 0.25, "high": 0.75}}
    summary = {
        "source": {"uri": "gsm8k"},
        "problems": 4,
        "samples": 1,
        "policies": {n: {"figures": figures_} for n in ("0", "2")},
    }
    store.write_json("evals/gsm8k-01234567/summary.json", summary)
    said = [sentence["text"] for sentence in collected(store)["story"] if "egrsd evaluate" in sentence["text"]]
    assert [text.partition(" problems")[0] for text in said] == ["`egrsd evaluate`, policy 0, 4", "`egrsd evaluate`, policy 2, 4"]


def test_rejected_rows_come_with_their_row_and_their_problem(tmp_path):
    """A newcomer saw the hash of a trace, and not row 113."""
    [row] = collected(hostile_run(tmp_path)[0])["rejected"]
    assert (row["round"], row["row"], row["reason"], row["traces"]) == (
        0,
        1,
        "verifier_error",
        1,
    )  # the second problem's last trace
    assert row["problem"] == f"{END} two"


def test_lengths_of_answers_keep_all_their_digits(tmp_path):
    """12 346 tokens were 12,350 in the list of problems, and 12,346 beside the answer."""
    byte_tokenizer(tmp_path / "model")
    store, run = new_run(tmp_path / "run", f"model.path={tmp_path / 'model'}", "evaluation.problems=2")
    evaluated(store, 0, ["wrong", None], 12_346)
    assert Evaluations.of(store, run).answers(10**6)["length"] == [[12_346.0, None]]


def test_a_rejected_row_is_counted_from_the_front_of_its_file(tmp_path):
    store, _ = hostile_run(tmp_path)
    store.save_run(resolve(store.load_run(), ["source.skip=160"]), {})
    [row] = collected(store)["rejected"]
    assert row["row"] == 161


def test_a_round_that_was_there_in_part_has_no_tokens_per_second(tmp_path):
    store, _ = hostile_run(tmp_path)
    known = {"writer": "round", "round": 0, "seconds_measure": 2.0}
    seen = Inventory(next(open_rounds(store, store.load_run())))

    def rate(**more):
        return figures.measure(seen, [known | more]).figures["engine_tokens_per_s"]

    assert rate(tokens_measured=5.0) > 0
    assert rate(tokens_measured=0.0) is None
    assert rate(seconds_stage_rollout=1.0) == rate(tokens_measured=5.0)  # as earlier versions wrote it
    assert rate(seconds_stage_grade=1.0) is None  # all traces were copied


def test_a_row_whose_traces_were_all_rejected_is_listed_once(tmp_path):
    byte_tokenizer(tmp_path / "model")
    store, run = new_run(tmp_path / "run", f"model.path={tmp_path / 'model'}")
    add_round(store, run, 0, [np.arange(4)] * 8, ["a"] * 8, ["one", "two"], dict.fromkeys(range(8), "died"))
    found = [(row["row"], row["problem"], row["traces"]) for row in collected(store)["rejected"]]
    assert found == [(0, "one", 4), (1, "two", 4)]


def test_who_wants_the_answers_of_the_base_before_the_first_round_is_told_how_to_see_one(tmp_path):
    """After 0 % of policy 0 a newcomer was told to look at the answers, and `report` said `distill` alone."""
    byte_tokenizer(tmp_path / "model")
    store, _ = new_run(tmp_path / "run", f"model.path={tmp_path / 'model'}")
    with pytest.raises(UserError, match=r"first$"):
        collected(store)
    evaluated(store, 0, ["wrong"] * 2)
    with pytest.raises(UserError, match=rf"first, or ask the base yourself: `egrsd ask --run {store.uri} --policy 0 QUESTION`"):
        collected(store)
