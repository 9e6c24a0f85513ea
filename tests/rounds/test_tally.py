"""The line of an evaluation, its warning, and the tally of stored runs, which has the figures of the evaluation itself."""

import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.evidence.evaluation import held_out
from pipeline.inspection.learning import listed
from pipeline.rounds.round import evaluation_run, open_round
from pipeline.rounds.tally import Tally, tallies, tally_of, told
from pipeline.stages import STAGES
from pipeline.store.directory import Store
from pipeline.store.manifest import Origin

STORED = Path(__file__).parents[1] / "stored_run" / "group.tar.xz"


@pytest.fixture
def store(tmp_path):
    """A run of two rounds that earlier code has made."""
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    return Store(str(tmp_path / "group"))


def test_a_line_names_what_is_neither_right_nor_wrong():
    few = Tally(0, {"unparsable": 5, "truncated": 13, "wrong": 2}, 0)
    assert few.line() == "policy 0: 0.0 % of 20 (13 truncated, 5 unparsable)"
    assert Tally(3, {"correct": 1, "wrong": 1}, 0).line() == "policy 3: 50.0 % of 2"
    assert Tally(0, {}, 4).line() == "policy 0: 0.0 % of 0 (4 rejected)"


def test_a_base_that_answers_nearly_nothing_right_is_a_warning_that_says_what_to_change():
    warned = Tally(0, {"truncated": 13, "wrong": 7}, 0).warning()
    assert warned.startswith("warning: 0 of 20 answers of policy 0 are right. A group without a right answer carries no signal.")
    for setting in ("prompts.student", "grade.answer_pattern", "grade.fallback", "rollout.max_new_tokens", "easier source"):
        assert setting in warned
    running = Tally(0, {"wrong": 7}, 0).warning(running=True)
    assert running.startswith("warning: 0 of 7 answers of policy 0 are right. A wrong answer lowers the chance of its tokens.")
    assert Tally(0, {"correct": 1, "wrong": 63}, 0).warning().startswith("warning: 1 of 64 answers of policy 0 is right.")
    assert Tally(0, {"correct": 2, "wrong": 98}, 0).warning() is None  # 2 of 100 are the share that is enough


def test_a_stored_evaluation_has_the_figures_of_its_samples(store):
    run = store.load_run()
    found = list(tallies(store, run))
    assert [one.policy for one in found] == [0, 2]
    for one in found:
        assert one.verdicts == held_out(store, run, one.policy).verdicts
    assert tally_of(store, run, 1) is None


def test_a_rejected_row_is_no_answer_though_it_has_a_verdict(store):
    """A reward that fails rejects a row which the verifier has judged. It lowered the held-out line."""
    before, entry = tally_of(store, store.load_run(), 0), store.entry("evals/0000", "grade", "0000")
    table = store.read(entry)
    rows = table.to_pylist()
    place = next(place for place, row in enumerate(rows) if row["verdict"] != "correct")
    rows[place] |= {"reject_reason": "reward_missing"}
    again = pa.Table.from_pylist(rows, schema=table.schema)
    store.commit("evals/0000", STAGES["grade"], "0000", again, Origin(facts=entry.facts, inputs=entry.inputs))
    after = tally_of(store, store.load_run(), 0)
    assert (after.answers, after.rejected) == (before.answers - 1, before.rejected + 1)
    assert after.verdicts["correct"] == before.verdicts["correct"]


def test_the_base_is_listed_until_a_round_has_figures(store):
    assert [one.base for one in listed(store.uri)] == [None]
    base = tally_of(store, store.load_run(), 0)
    store.delete("metrics")
    assert [one.base for one in listed(store.uri)] == [base.accuracy]


def test_a_warning_comes_with_answers_and_no_control_character_of_them(store, monkeypatch):
    """A newcomer was told to look at the answers' format, and no command showed an answer."""
    monkeypatch.setattr(Tally, "accuracy", 0.0)
    work = open_round(store, evaluation_run(store.load_run()), "evals", 0)
    line, warning, *shown = told(work, teaches=True)
    assert warning.startswith("warning: ")
    assert len(shown) == 2
    for text in shown:
        verdict, said = text.strip().split(": ", 1)
        assert verdict in {"wrong", "unparsable", "truncated"}
        assert said[0] in "'\""
        assert said.isprintable()
        assert len(said) < 220
    assert list(told(work, teaches=False)) == [line]


def test_an_evaluation_that_is_not_graded_yet_has_no_tally(store):
    store.delete("evals/0000/grade")
    assert tally_of(store, store.load_run(), 0) is None
