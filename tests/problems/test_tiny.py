"""The tiny task: problems that are disjoint and right, traces that fail as they should, a tokenizer that loses nothing."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SettingError
from pipeline.models.resolve import asset_path, resolve_model
from pipeline.models.warmstart import build_tokenizer
from pipeline.problems import tiny

indices = st.integers(0, 10**6)


@settings(max_examples=50, deadline=None)
@given(indices, st.integers(0, 2), st.sampled_from(["train", "test"]))
def test_answers_are_what_python_says(index: int, seed: int, split: str) -> None:
    item = tiny.problem(index, seed, split)
    assert eval(item["problem"]) == int(item["answer"])
    assert item == tiny.problem(index, seed, split)
    found = re.search(tiny.ANSWER_PATTERN, item["solution"])
    assert found is not None
    assert found[1] == item["answer"]
    for equation in item["solution"].split("#")[0].split(";"):
        left, right = equation.split("=")
        assert eval(left) == int(right)


def test_a_known_solution() -> None:
    assert tiny.reference_solution("7+4-3+9") == "7+4=11;11-3=8;8+9=17#17"
    assert tiny.reference_solution("1-9+2-5") == "1-9=-8;-8+2=-6;-6-5=-11#-11"


def test_splits_share_nothing_and_problems_do_not_repeat() -> None:
    test = [tiny.problem(i, 0, "test")["problem"] for i in range(5000)]
    train = [tiny.problem(i, 0, "train")["problem"] for i in range(40_000)]
    assert len(set(test)) == len(test)
    assert len(set(train)) == len(train)
    assert not set(test) & set(train)
    assert not {tiny.problem(i, 7, "test")["problem"] for i in range(5000)} & set(train)
    assert [tiny.problem(i, 1, "test")["problem"] for i in range(100)] != test[:100]


def test_an_unknown_split_is_the_users_mistake() -> None:
    with pytest.raises(SettingError, match=r"source\.split.*'train' or 'test'"):
        tiny.problem(0, 0, "validation")


@settings(max_examples=50, deadline=None)
@given(indices, st.integers(0, 10**6), st.sampled_from([tiny.UNAIDED, tiny.AIDED]))
def test_traces_are_consistent_with_themselves(index: int, seed: int, habits: tiny.Habits) -> None:
    """The answer is the last result, each step starts from the result before it, and every `wait` repairs a wrong one."""
    text = tiny.problem(index, 0, "train")["problem"]
    body, answer = tiny.verbose_trace(text, random.Random(seed), habits).split("#")
    parts = body.split(";")
    results = [part.removeprefix("maybe ").removeprefix("check ") for part in parts]
    assert results[-1].split("=")[1] == answer
    running = text[0]
    for part, result in zip(parts, results, strict=True):
        if part == "wait":
            continue
        left, right = result.split("=")
        if part.startswith("check "):
            assert right == running
            assert eval(left) == int(right)
        else:
            running = right
    for place in (i for i, part in enumerate(parts) if part == "wait"):
        before, after = results[place - 1].split("="), results[place + 1].split("=")
        assert before[0] == after[0]
        assert int(before[1]) != eval(before[0]) == int(after[1])


def test_habits_leave_room_for_the_student_and_an_edge_to_the_teacher() -> None:
    def right(habits: tiny.Habits) -> float:
        rng, items = random.Random(0), [tiny.problem(i, 0, "train") for i in range(2000)]
        return sum(tiny.verbose_trace(item["problem"], rng, habits).endswith(f"#{item['answer']}") for item in items) / 2000

    assert 0.4 < right(tiny.UNAIDED) < 0.65
    assert right(tiny.AIDED) > right(tiny.UNAIDED) + 0.25
    assert right(tiny.Habits(0, 0, 0, 0, 0)) == 1


@settings(max_examples=30, deadline=None)
@given(indices, st.integers(0, 1000))
def test_the_tokenizer_loses_nothing(index: int, seed: int) -> None:
    tokenizer = build_tokenizer()
    trace = tiny.verbose_trace(tiny.problem(index, 0, "train")["problem"], random.Random(seed))
    ids = tokenizer(trace).input_ids
    assert len(ids) == len(trace)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == trace


def test_the_chat_template_frames_one_user_message() -> None:
    tokenizer, item = build_tokenizer(), tiny.problem(0, 0, "test")
    for template in (tiny.STUDENT_PROMPT, tiny.TEACHER_PROMPT):
        content = template.format(**item)
        for thinking in (True, False):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
            assert text == f"<bos>{content}\n"
    assert tokenizer(text).input_ids[0] == tokenizer.bos_token_id
    assert len(tokenizer("{}é").input_ids) == 3  # symbols it does not know become <unk>, one each
    with pytest.raises(Exception, match=r"prompts\.system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "be brief"}], tokenize=False)


def test_the_shipped_tokenizer_is_this_one() -> None:
    from transformers import AutoTokenizer

    shipped, built = AutoTokenizer.from_pretrained(asset_path()), build_tokenizer()
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped.chat_template == built.chat_template
    assert shipped.backend_tokenizer.to_str() == built.backend_tokenizer.to_str()


def test_names_resolve() -> None:
    assert resolve_model("tiny-reasoner") == str(asset_path())
    assert (asset_path() / "config.json").is_file()
    assert resolve_model("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, pipeline.problems.tiny; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
