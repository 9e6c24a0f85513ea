"""What a model card says of how the weights were made: each sentence is true of the run's own settings."""

from __future__ import annotations

import pytest

from pipeline.evidence import model_card
from pipeline.evidence.model_card import Released
from pipeline.overrides import resolve
from pipeline.recipes import demo

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
