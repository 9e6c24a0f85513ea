"""A raw row becomes a problem: answers of every type, conversations, imported traces, and other columns within their bound."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Source
from pipeline.contract import Reject
from pipeline.problems.problem import Numeral, read_problem
from pipeline.problems.shape import Shape

SHAPE = Shape("problem", "", "answer")
USER = {"role": "user", "content": "1+1?"}
TESTS = ["assert f(1) == 2", "assert f(2) == '1,000'"]
CHECKED = "#### edge cases\ndef check(f):\n    assert f('\\d') == '\\boxed{4}'\n"


def read(row, shape=SHAPE, **settings):
    return read_problem(0, {"problem": "p", "answer": "2"} | row, shape, Source(**settings))


@pytest.mark.parametrize(
    ("cell", "answer"),
    [
        (2, "2"),
        (2.0, "2"),
        (2.5, "2.5"),
        (True, "true"),
        (Numeral("0.50"), "0.50"),
        (Numeral("8.0"), "8"),
        ("so \\boxed{2}", "2"),
        (["2"], "2"),
        ([1, 2.0, "x"], "1, 2, x"),
        (["1,000", "2"], "1000, 2"),
        (["(1,200)", "2"], "(1,200), 2"),
        ('["5", "7"]', "5, 7"),
        ('["5"]', "5"),
        ('["1,000", "7"]', "1000, 7"),
        ('["red", "blue"]', '["red", "blue"]'),
        ('["5"', '["5"'),
        ("So <answer>5</answer>", "5"),
        ("<answer>\\boxed{5}</answer>", "5"),
        ("\\boxed{4} <answer>5</answer>", "5"),
        ("<answer>5</answer> \\boxed{4}", "4"),
        (TESTS, json.dumps(TESTS)),
        (json.dumps(TESTS), json.dumps(TESTS)),
        (["assert f('a')", "assert f('b')  # #### 2"], json.dumps(["assert f('a')", "assert f('b')  # #### 2"])),
        (TESTS[:1], TESTS[0]),
        (CHECKED, CHECKED),
        ("We assert it:\nassert (x) is 4. #### 4", "4"),
        ([], None),
        ([None, 1], None),
        ([[1]], None),
        ({"a": 1}, None),
        (None, None),
    ],
)
def test_an_answer_is_text_a_number_or_a_list_of_them(cell, answer):
    found = read({"answer": cell})
    assert (found.answer, found.reject) == (answer, None if answer else Reject.MISSING_ANSWER)


@pytest.mark.parametrize(
    ("messages", "detail"),
    [
        ([{"role": "system", "content": "s"}], "has no user turn"),
        ([USER, {"role": "assistant", "content": "2"}], "ends with a turn of the assistant"),
        ([USER, {"role": "tool", "content": "2"}], "ends with a turn of role 'tool'"),
        ([USER | {"content": " "}], "empty user turn"),
        ([USER | {"content": None}], "turn 1: its content is empty"),
        ([USER | {"content": [{"type": "image", "image": "x"}]}], "turn 1: its content is no text"),
        ([USER | {"role": "human"}], "turn 1: role 'human' is none of"),
        ([USER, {"role": "assistant", "content": "x", "tool_calls": [1]}, USER], "turn 2: it calls tools"),
    ],
)
def test_messages_that_cannot_be_asked_are_rejected_with_their_turn(messages, detail):
    found = read({"problem": messages})
    assert found.reject == Reject.BAD_MESSAGES
    assert detail in found.detail
    assert "'problem'" in found.detail


def test_a_conversation_keeps_its_turns_and_a_single_one_is_plain_text():
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
    alone = read({"problem": [USER | {"content": parts, "tool_calls": None}]})
    assert alone == read({"problem": "1+1?"})
    several = read({"problem": [USER, {"role": "assistant", "content": "2"}, USER | {"content": "Sure?"}]})
    assert (several.problem, several.reject) == ("Sure?", None)
    assert [turn["role"] for turn in json.loads(several.messages)] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("cell", "traces"),
    [
        ("2", ("2",)),
        ([{"role": "assistant", "content": "2"}], ("2",)),
        (["2", None, "3"], ("2", "", "3")),
        ("  ", None),
        ([], None),
        ([USER], None),
        (None, None),
    ],
)
def test_imported_traces_are_a_text_messages_or_a_list_of_texts(cell, traces):
    found = read({"r": cell}, replace(SHAPE, response="r"))
    assert (found.imported, found.reject) == (traces, None if traces else Reject.EMPTY_RESPONSE)


def test_a_cell_that_is_nested_deeply_ends_no_run():
    """Six hundred brackets in a column that nobody reads ended `distill` with a RecursionError."""
    deep, flat = json.loads("[" * 600 + "]" * 600), json.loads("[" * 100 + "]" * 100)
    found = read({"deep": deep, "flat": flat}, replace(SHAPE, other=("deep", "flat")))
    assert (json.loads(found.extra), found.left_out, found.reject) == ({"flat": flat}, ("deep",), None)
    text = '["' + '", [' * 3000
    assert read({"answer": text}).answer == text
    assert read({"answer": '["1", ' + "[" * 100_000}).reject is None


def test_other_columns_are_carried_with_their_types():
    numbers = {"n": Numeral("7"), "x": Numeral("1e3"), "nan": float("nan")}
    cells = numbers | {"day": datetime.date(2026, 1, 2), "o": {"a": [True, None]}}
    found = read(cells, replace(SHAPE, other=(*cells, "absent")))
    assert json.loads(found.extra) == {"n": 7, "x": 1000.0, "nan": None, "day": "2026-01-02", "o": {"a": [True, None]}}
    assert read({}, replace(SHAPE, other=("absent",))).extra is None


@given(
    st.dictionaries(st.sampled_from(["a", "bb", "ü"]), st.text(st.characters(codec="utf-8"), max_size=60)), st.integers(2, 120)
)
def test_other_columns_stay_within_their_bytes_and_the_largest_goes_first(cells, most):
    shape = replace(SHAPE, other=("a", "bb", "ü"))
    found = read(cells, shape, carry_bytes=most)
    kept = json.loads(found.extra or "{}")
    assert len((found.extra or "").encode()) <= most
    assert kept.keys() | set(found.left_out) == cells.keys()
    assert not kept.keys() & set(found.left_out)
    assert found.reject is None
    asked = read(cells, shape, carry_bytes=most, carry=("a", "bb", "ü"))
    assert asked.reject == (Reject.EXTRA_TOO_LARGE if found.left_out else None)
