"""What a model card says of how the weights were made: each sentence is true of the run's own settings."""

from __future__ import annotations

import pytest
from in_process import evaluate, publish

from pipeline.evidence import model_card
from pipeline.evidence.evaluation import held_out
from pipeline.evidence.model_card import Released
from pipeline.overrides import resolve
from pipeline.recipes import demo
from pipeline.report.held_out import Evaluations
from pipeline.store.directory import Store

PAPER = "entropy-guided self-distillation"


@pytest.mark.parametrize(
    ("sets", "said", "not_said"),
    [
        ([], [PAPER, "from its own answers", "- self-distillation", "Those of the model itself are", "A verifier (exact)"], []),
        (["objective.name=grpo"], ["its own answers with the objective `grpo`"], [PAPER, "self-distillation"]),
        (["objective.control=inverted"], ["with the objective `cl_egrsd`"], [PAPER]),
        (["rollout.teacher_share=0.5"], ["its own answers and answers of a teacher", "the model itself and a teacher are"], []),
        (["objective.name=sft", "rollout.teacher_share=0.5"], ["learned from answers of a teacher with"], ["itself", PAPER]),
    ],
)
def test_the_card_says_what_the_run_did(sets, said, not_said):
    """A card of `grpo` said that entropy had guided it, and one of half a teacher's traces that the model wrote them all."""
    run = resolve(demo(), sets)
    released = Released(3, False, "base")
    text = "\n".join((model_card._metadata(run, released), model_card._title(run, released), model_card._data(run)))
    assert [part for part in said if part not in text] == []
    assert [part for part in not_said if part in text] == []


@pytest.fixture
def store(tmp_path):
    """A run with two policies."""
    made = Store(str(tmp_path / "run"))
    publish(made, 1, tmp_path / "policy")
    return made


def test_answers_of_two_samplings_are_not_paired_under_the_name_of_the_newer_one(store):
    """A prolonged run evaluated its base anew at temperature 0.5, and the card set it beside a policy at temperature 1."""
    run = resolve(demo(), ["evaluation.problems=4"])
    evaluate(store, run, 0)
    evaluate(store, run, 1)
    card = "\n".join(model_card._held_out(store, run, 1))
    assert "| base | policy 1 | difference, paired |" in card
    assert "at temperature 1" in card
    assert Evaluations.of(store, run).change() is not None
    cooler = resolve(run, ["evaluation.temperature=0.5"])
    evaluate(store, cooler, 0)
    card = "\n".join(model_card._held_out(store, cooler, 1))
    assert card.startswith("| 4 held-out problems | policy 1 |")
    assert card.endswith("Answers were sampled and graded with earlier settings.")
    found = Evaluations.of(store, cooler)
    assert (list(found.samples), found.change()) == ([1], None)
    assert [shown["sampling"] for shown in found.figures()] == ["and graded with earlier settings"]
    said = "What policy 0 answered is left out: its problems or settings were not those of the last evaluation."
    assert found.notes() == [said]
    evaluate(store, cooler, 1)
    assert "at temperature 0.5" in "\n".join(model_card._held_out(store, cooler, 1))
    assert Evaluations.of(store, cooler).change() is not None


def test_settings_that_decide_no_answer_part_no_evaluations(store):
    run = resolve(demo(), ["evaluation.problems=4"])
    evaluate(store, run, 0)
    later = resolve(run, ["score.fallback=false", "rounds=4", "train.learning_rate=1e-3", "label.gamma=0.5"])
    evaluate(store, later, 1)
    assert Evaluations.of(store, later).change() is not None
    assert not held_out(store, later, 0).earlier
