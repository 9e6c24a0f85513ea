"""A round of nothing but rejected rows ends with the commonest reason and its remedy."""

import pytest
from in_process import brought, planned
from transformers import LlamaConfig

from pipeline.contract import Reject
from pipeline.driver import open_sources
from pipeline.errors import ModelError, SettingError, UserError
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.recipes import demo
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.refused import REMEDIES, refuse_mixed_control, refuse_nothing_left, refuse_unusable
from pipeline.stages import MEASURE


def test_a_round_of_rejected_rows_is_refused_with_reason_and_remedy(tmp_path):
    work = planned(tmp_path, "model.max_model_len=80")  # no prompt fits beside 72 new tokens
    brought(work, *MEASURE)
    with pytest.raises(UserError, match=r"all 8 rows were rejected, 8 as prompt_too_long: .*Raise model\.max_model_len"):
        refuse_nothing_left(work, MEASURE)


def test_a_round_with_a_row_left_goes_on(tmp_path):
    work = planned(tmp_path)
    brought(work, *MEASURE)
    assert Inventory(work).rejected(MEASURE[-1]).total() < 8
    assert refuse_nothing_left(work, MEASURE) is None


@pytest.mark.parametrize("size", [258, 257])
def test_a_template_that_writes_tokens_beyond_the_model_is_refused_before_anything_starts(tmp_path, chatml, size):
    """ChatML's tokens, added behind the vocabulary of a Llama whose embedding nobody resized. Engines found it once they ran."""
    LlamaConfig(vocab_size=size).save_pretrained(tmp_path)
    chatml.save_pretrained(tmp_path)
    run = resolve(demo(), [f"model.path={tmp_path}", "model.max_model_len=512"])
    source = open_source(run.source)
    if size == 258:
        assert refuse_unusable(source, range(4), run, "the first round") is None
        return
    with pytest.raises(ModelError, match=r"its prompts hold '<\|im_start\|>', id 257, and the model has 257 tokens.*resize"):
        refuse_unusable(source, range(4), run, "the first round")


def test_the_students_entropy_is_refused_under_eopd_where_work_begins():
    """It would change two things. A stored run that has it can be read all the same."""
    run = resolve(demo(), ["objective.name=eopd", "objective.gate=entropy", "objective.entropy=student", "score.keep_topk=16"])
    for refuse in (lambda: refuse_mixed_control(run.objective), lambda: open_sources(run)):
        with pytest.raises(SettingError, match=r"objective\.entropy: .*which tokens learn the teacher's distribution"):
            refuse()
    refuse_mixed_control(resolve(run, ["objective.entropy=teacher"]).objective)


def test_every_reason_has_a_remedy():
    assert REMEDIES.keys() == set(Reject)
