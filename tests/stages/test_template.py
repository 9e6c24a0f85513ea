"""Chat templates that loop, grow or fail are a named error in bounded time; others render what transformers renders."""

import resource
import threading

import pytest

from pipeline.errors import ModelError
from pipeline.models.tokenizers.tokenizer import check_template
from pipeline.stages import template
from pipeline.stages.chat import controls, student_prompt

NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in messages %}{% endfor %}{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
SQUARED = "{% set n = namespace(s=7) %}{% for i in range(80) %}{% set n.s = n.s * n.s %}{% endfor %}"


@pytest.fixture
def hostile(chatml, monkeypatch):
    """A tokenizer whose chat template is replaced, and little time and memory."""
    monkeypatch.setattr(template, "MOST_CPU_S", 0.5)
    monkeypatch.setattr(template, "MOST_BYTES", 256 * 2**20)

    def with_template(text):
        monkeypatch.setattr(chatml, "chat_template", text)
        return chatml

    return with_template


def test_todays_date_is_the_same_on_every_day(hostile):
    """A template of Llama or SmolLM writes it. A resumed run then had other prompts, and so had its last evaluation."""
    dated = hostile("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    assert template.render(dated, [{"role": "user", "content": "Hi"}]) == "26 Jul 2024 Hi"


def test_several_templates_without_a_default_are_refused(hostile):
    named = hostile({"tool_use": "{{ messages }}", "rag": "{{ messages }}"})
    with pytest.raises(ModelError, match="several chat templates, and none of them is named default"):
        check_template(named)
    both = hostile({"tool_use": "<tool>", "default": "{{ messages }}"})
    check_template(both)
    assert controls.__wrapped__(both).findall("<|im_end|> <think>") == ["<|im_end|>"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NESTED, "needs more than 0.5 s for one prompt"),
        (SQUARED, "needs more than 0.5 s for one prompt"),
        ("{{ 'a' * 10**10 }}", "needs more than 256 MiB for one prompt"),
        ("{{ 9 ** (9 ** 9) }}", "needs more than 0.5 s for one prompt"),
        ("{{ 'a' * 10000000000 }}", "needs more than 256 MiB for one prompt"),
        (DOUBLED, "needs more than .* for one prompt"),
        ("{{ 'x' | center(9000000) }}", "makes 9000000 characters of one prompt"),
        ("{% for a in range(1000000000) %}{% endfor %}", r"fails \(OverflowError"),
        ("{% include 'other' %}", r"fails \(TypeError"),
        ("{{ messages.__class__.__mro__ }}", "refuses the prompt"),
        ("{{ raise_exception('no system message') }}", "refuses the prompt: no system message"),
        ("{{ 1 / 0 }}", r"fails \(ZeroDivisionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", r"fails \(RecursionError"),
        ("{% if %}", "refuses the prompt"),
    ],
)
def test_a_template_that_cannot_be_trusted_is_a_named_error(hostile, text, message):
    with pytest.raises(ModelError, match=message):
        student_prompt(hostile(text), "2+2?")
    assert threading.active_count() < 50
    assert student_prompt(hostile("{{ messages[0].content }}"), "2+2?")  # the bounds are gone


def test_the_ids_are_those_of_transformers_itself(chatml):
    messages = [{"role": "user", "content": "2+2?"}]
    plain = chatml.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, enable_thinking=True)
    assert student_prompt(chatml, "2+2?") == list(plain)


def test_stars_in_a_template_are_no_power(hostile):
    assert student_prompt(hostile("**{{ messages[0].content }}**{% generation %}{% endgeneration %}"), "2+2?")


def test_a_template_changes_no_limit_of_this_process(hostile, monkeypatch):
    changed = []
    monkeypatch.setattr(resource, "setrlimit", lambda *change: changed.append(change))
    assert student_prompt(hostile("{{ messages[0].content }}"), "2+2?")
    assert changed == []
