"""Prompts through real tokenizers: the tiny reasoner's, and one with a ChatML template that knows `enable_thinking`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pipeline.config import Model
from pipeline.errors import ModelError, SettingError
from pipeline.models.tokenizer import template_hash, tokenizer_of
from pipeline.models.warmstart import build_tokenizer
from pipeline.problems import tiny
from pipeline.stages.chat import fill, fits, splice, student_prompt, teacher_prompt

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
TEACHER = "{problem} || {solution}"


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


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


def test_loading_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    saved = build_tokenizer()
    saved.save_pretrained(tmp_path / "good")
    loaded = tokenizer_of(Model(path=str(tmp_path / "good")))
    assert student_prompt(loaded, "1+1") == student_prompt(saved, "1+1")
    assert template_hash(loaded) == template_hash(saved)
    with pytest.raises(ModelError, match="no such folder"):
        tokenizer_of(Model(path=str(tmp_path / "missing")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded"):
        tokenizer_of(Model(path=str(tmp_path / "empty")))
    saved.chat_template = None
    saved.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="no chat template"):
        tokenizer_of(Model(path=str(tmp_path / "bare")))


def test_the_hash_sees_template_and_vocabulary(chatml):
    base = build_tokenizer()
    other_template, other_vocabulary = build_tokenizer(), build_tokenizer()
    other_template.chat_template += " "
    other_vocabulary.add_tokens(["extra"])
    hashes = {template_hash(t) for t in (base, other_template, other_vocabulary, chatml)}
    assert len(hashes) == 4
    assert template_hash(build_tokenizer()) == template_hash(base)


@given(problem=st.text(), solution=st.text())
def test_filling_never_looks_into_what_it_filled_in(problem, solution):
    for text in (problem, f"{problem}{{solution}}", f"{{problem}}{problem}", "{} {0} {problem!r}"):
        assert fill("A {problem} B {solution} C {x} {{", text, solution) == f"A {text} B {solution} C {{x}} {{{{"


@given(prompt=st.lists(st.integers(0, 10)), response=st.lists(st.integers(0, 10)))
def test_a_splice_keeps_both_parts(prompt, response):
    joined = splice(prompt, response)
    assert joined[: len(prompt)] == prompt
    assert joined[len(prompt) :] == response


def test_a_prompt_fits_up_to_the_last_token():
    assert fits(192, 64, 256)
    assert not fits(193, 64, 256)
