"""Prompts through real tokenizers: the tiny reasoner's, and one with a ChatML template that knows `enable_thinking`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ModelError, SettingError
from pipeline.models.warmstart import build_tokenizer
from pipeline.problems import tiny
from pipeline.stages.chat import fill, fits, splice, student_prompt, teacher_prompt

TEACHER = "{problem} || {solution}"


def test_the_tiny_reasoners_prompts_are_what_its_warm_start_saw():
    tokenizer = build_tokenizer()
    ids = student_prompt(tokenizer, "7+4", tiny.STUDENT_PROMPT)
    assert tokenizer.decode(ids) == "<bos>7+4\n"
    assert all(type(token) is int for token in ids)
    privileged = teacher_prompt(tokenizer, "7+4", "7+4=11#11", tiny.TEACHER_PROMPT)
    assert tokenizer.decode(privileged) == "<bos>7+4|7+4=11#11\n"


def test_system_message_and_thinking_reach_the_template(chatml):
    plain = chatml.decode(student_prompt(chatml, "2+2?"))
    assert plain == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    briefed = chatml.decode(student_prompt(chatml, "2+2?", system="Be brief.", thinking=False))
    assert briefed.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?")
    assert briefed.endswith("assistant\n<think></think>")


def test_templates_that_cannot_work_are_named(chatml):
    with pytest.raises(SettingError, match=r"prompts\.student: lacks \{problem\}"):
        student_prompt(chatml, "x", "Answer.")
    with pytest.raises(SettingError, match=r"prompts\.student: holds \{solution\}"):
        student_prompt(chatml, "x", TEACHER)
    with pytest.raises(SettingError, match=r"prompts\.teacher: lacks \{solution\}"):
        teacher_prompt(chatml, "x", "y", "{problem}")
    with pytest.raises(SettingError, match=r"prompts\.teacher: lacks \{problem\}"):
        teacher_prompt(chatml, "x", "y", "{solution}")


def test_unusable_tokenizers_are_the_users_to_change():
    tokenizer = build_tokenizer()
    with pytest.raises(ModelError, match=r"leave prompts\.system empty"):
        student_prompt(tokenizer, "1+1", system="Be brief.")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        student_prompt(tokenizer, "1+1")


@given(problem=st.text(), solution=st.text())
def test_filling_never_looks_into_what_it_filled_in(problem, solution):
    for text in (problem, f"{problem}{{solution}}", f"{{problem}}{problem}", "{} {0} {problem!r}"):
        assert fill("A {problem} B {solution} C {x} {{", text, solution).text == f"A {text} B {solution} C {{x}} {{{{"


@given(prompt=st.lists(st.integers(0, 10)), response=st.lists(st.integers(0, 10)))
def test_a_splice_keeps_both_parts(prompt, response):
    joined = splice(prompt, response)
    assert joined[: len(prompt)] == prompt
    assert joined[len(prompt) :] == response


def test_a_prompt_fits_up_to_the_last_token():
    assert fits(192, 64, 256)
    assert not fits(193, 64, 256)
