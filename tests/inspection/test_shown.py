"""Three real prompts, as the models will see them: the ids of the stage that a run has, and their text."""

from pipeline.inspection.shown import show_prompts
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.recipes import demo
from pipeline.stages.prompts import prompts


def test_the_prompts_are_those_that_the_stage_makes():
    run = demo()
    source, tokenizer = open_source(run.source), tokenizer_of(run.model)
    shown = show_prompts(source, run)
    made = prompts(source.rows([0, 1, 2]), run, tokenizer).to_pylist()
    assert [(one.row, one.reader) for one in shown] == [(n, who) for n in range(3) for who in ("student", "teacher")]
    assert [one.ids for one in shown] == [made[n][f"{who}prompt_tokens"] for n in range(3) for who in ("", "teacher_")]
    assert shown[1].text == tokenizer.decode(shown[1].ids)
    head, ids, text, *_ = shown[0].lines()
    assert head == f"prompt of row 0, as the student sees it: {len(shown[0].ids)} ids"
    assert ids.split()[1:] == [str(number) for number in shown[0].ids]
    assert made[0]["problem"] in text


def test_a_named_teacher_has_its_own_prompt():
    run = resolve(demo(), ["teachers.big.prompt=plain"])
    shown = show_prompts(open_source(run.source), run, 1)
    assert [one.reader for one in shown] == ["student", "teacher 'big'"]
    assert shown[0].ids == shown[1].ids
