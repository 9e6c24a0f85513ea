"""Answers are found in responses, and two spellings of one answer are the same."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.answers.responses import final_answer, last_boxed
from pipeline.answers.texts import compare_texts, decide, normal_form


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed {\frac{1}{2}} and { more", r"\frac{1}{2}"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"}} { \boxed{7}", "7"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{", None),
        ("nothing", None),
    ],
)
def test_last_boxed(text, found):
    assert last_boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"1 2 \boxed{3} #### 4 5", "3"),
        ("1 #### 4 apples\n5", "4 apples"),
        ("7-3 is 4.", "4"),
        ("It is -3", "-3"),
        ("7-3", "7-3"),
        ("about 1,234.50 in all, Sir", "1,234.50"),
        ("1, 2", "1, 2"),
        ("half: 1/2.", "1/2"),
        (r"\boxed{ }", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_final_answer(text, found):
    assert final_answer(text) == found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("+07", "7"),
        ("1,000.50", "1000.5"),
        ("-0.0", "0"),
        ("$5$", "5"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        ("−4.", "-4"),
        (r"\text{Red}", "Red"),
        ("x + 1", "x+1"),
        (".5", "0.5"),
    ],
)
def test_spellings_of_one_answer(one, other):
    assert normal_form(one) == normal_form(other)
    assert compare_texts(one, other) is True


@given(st.integers(-(10**12), 10**12), st.integers(0, 3))
def test_a_number_has_one_normal_form(value, zeros):
    assert normal_form(f"{value:,}") == normal_form(f"{value}.{'0' * zeros}") == str(value)
    assert compare_texts(str(value), str(value + 1)) is False


@given(st.text(alphabet="0123456789+-.,/ \\${}abc"))
def test_a_normal_form_is_its_own(text):
    assert normal_form(normal_form(text)) == normal_form(text) or "\\" in text or "$" in text or "." in text


@given(st.text(alphabet=r"\boxed{} 1", max_size=80), st.integers(0, 99))
def test_a_closing_box_is_found_after_anything_balanced(noise, number):
    assert last_boxed(noise.replace("\\", "") + f"\\boxed{{{number}}}") == str(number)


UNITS = [r"\[", r"\(", r"\[\\[", "<answer>", "<answer>x</answer>", r"\boxed{1}", "$", "$a", r"\$", "answer: . "]
UNITS += ["####", "1,", "?  ", "<think>", " ", "**", " **a", "<b>", "<<", "\n- "]
HOSTILE = [(before, unit, after) for unit in UNITS for before in ("", "answer is 5", "x ") for after in ("", " 5", "\n.")]


def processor_s(before: str, unit: str, after: str, chars: int) -> float:
    started = time.thread_time()
    final_answer(before + unit * (chars // len(unit)) + after)
    return time.thread_time() - started


def test_four_times_the_text_is_no_more_than_linear_work():
    assert len(HOSTILE) >= 100
    assert [text for text in HOSTILE for chars in (200_000, 19_000) if all(grows(text, chars) for _ in range(4))] == []


def grows(text: tuple[str, str, str], chars: int) -> bool:
    """Whether a text of `chars` takes long, and much more than four times what a quarter takes. One measure may be disturbed."""
    return (whole := processor_s(*text, chars)) > 0.5 and whole > 9 * processor_s(*text, chars // 4)


def test_a_long_word_and_a_label_of_words_are_read_in_one_way():
    started = time.thread_time()
    assert decide("ab" * 20 + "!", "5/2") is not True  # forty letters had 100 million ways to be words
    assert time.thread_time() - started < 2
    assert compare_texts("Total profit: 5", "5") is True


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"So \[ \begin{array} 1 \\[2pt] 2 \end{array} \]", r"\begin{array} 1 \\[2pt] 2 \end{array}"),
        (r"So \(x\) or \[ x = 5 \]", "x = 5"),
        ("<answer>1</answer> <answer>2</answer> <answer>", "2"),
        (r"<answer>1</answer> \boxed{3}", "3"),
        ("<answer>1<answer>2</answer>", "1<answer>2"),
    ],
)
def test_delimiters_are_paired_in_one_pass(text, found):
    assert final_answer(text) == found
