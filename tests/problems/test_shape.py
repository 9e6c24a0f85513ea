"""What a source holds is found by looking, said, and refused where it could mean two things. Settings always win."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Source
from pipeline.contract import Reject
from pipeline.errors import SourceError
from pipeline.problems.sources import open_source

USER = {"role": "user", "content": "1+1?"}
SYSTEM = {"role": "system", "content": "Be brief."}
WROTE = {"role": "assistant", "content": "It is \\boxed{2}."}
VERL = {
    "data_source": "sums",
    "prompt": [USER],
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 7, "answer": "1+1 = 2\n#### 2"},
}


def opened(tmp_path, row, kind="jsonl", **settings):
    """The problems of a file with ten times the same row."""
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row] * 10), path)
    else:
        path.write_text((json.dumps(row) + "\n") * 10)
    return open_source(Source(uri=str(path), **settings))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (VERL, ("prompt", "extra_info.answer", "reward_model.ground_truth")),
        (VERL | {"extra_info": {"answer": "2"}}, ("prompt", "", "reward_model.ground_truth")),
        ({"prompt": [SYSTEM, USER], "solution": "So \\boxed{2}"}, ("prompt", "solution", "solution")),
        ({"prompt": "1+1?", "solution": "So \\boxed{2}"}, ("prompt", "solution", "solution")),
        ({"messages": [USER], "solution": "2"}, ("messages", "", "solution")),
        ({"query": "1+1?", "response": "So #### 2", "answer": 2}, ("query", "", "answer")),
        ({"question": "1+1?", "answer": "One and one make a pair, and a pair is two. #### 2"}, ("question", "answer", "answer")),
        ({"problem": "1+1?", "solution": "2 it is", "answer": "2"}, ("problem", "solution", "answer")),
    ],
)
def test_the_columns_that_peers_use_are_found(tmp_path, kind, row, expected):
    problems = opened(tmp_path, row, kind)
    assert (problems.shape.problem, problems.shape.solution, problems.shape.answer) == expected
    [first] = problems.without_solutions().rows([0])
    assert (first.problem, first.answer, first.reject) == ("1+1?", "2", None)
    said = [text for text in problems.cautions() if text.startswith("note:")]
    assert len(said) == len(problems.shape.found)
    assert bool(said) == (expected[0] != "problem")


def test_the_same_row_gives_the_same_problem_whatever_holds_it(tmp_path):
    import datasets

    datasets.Dataset.from_list([VERL] * 10).save_to_disk(str(tmp_path / "saved"))
    saved = open_source(Source(uri=str(tmp_path / "saved"))).rows([3])
    assert saved == opened(tmp_path, VERL, "parquet").rows([3]) == opened(tmp_path, VERL).rows([3])
    extra = json.loads(saved[0].extra)
    assert extra == {name: VERL[name] for name in ("data_source", "reward_model", "extra_info")}
    assert type(extra["extra_info"]["index"]) is int


def test_settings_win_over_what_looking_would_find(tmp_path):
    row = VERL | {"other": [SYSTEM], "target": "3"}
    problems = opened(tmp_path, row, answer="target", solution="reward_model.style")
    [first] = problems.rows([0])
    assert (first.solution, first.answer) == ("rule", "3")
    assert opened(tmp_path, row, answer="extra_info.index").rows([0])[0].answer == "7"
    assert opened(tmp_path, {"a.b": "x", "a": {"b": "y"}, "answer": "2"}, problem="a.b", solution="").rows([0])[0].problem == "x"


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"messages": [USER], "query": "1+1?", "answer": "2"}, {}, r"could be 'messages' or 'query'.+source\.problem=messages"),
        ({"prompt": "1", "ground_truth": "2", "final_answer": "3"}, {}, r"answer could be 'ground_truth' or 'final_answer'"),
        ({"text": "1+1?", "answer": "2"}, {}, r"has no column 'problem'; there are: answer, text"),
        ({"prompt": "1+1?", "answers": "2", "solution": "2"}, {}, r"has no column 'answer'.+source\.answer=answers\?"),
        ({"prompt": "1+1?", "solution": "a long story that states nothing at all, alas"}, {}, r"has no column 'answer'"),
        (VERL, {"answer": "reward_model.truth"}, r"'reward_model' has no part 'truth'.+there are: ground_truth, style"),
        (VERL, {"answer": "target"}, r"has no column 'target'"),
        (VERL, {"response": "completion"}, r"has no column 'completion'"),
        (VERL, {"carry": ("data_sorce",)}, r"no column 'data_sorce' that could be carried.+data_source"),
    ],
)
def test_a_shape_that_could_mean_two_things_or_nothing_is_refused(tmp_path, row, settings, message):
    for kind in ("jsonl", "parquet"):
        with pytest.raises(SourceError, match=message):
            opened(tmp_path, row, kind, **settings)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "settings", "listed", "advice"),
    [
        ({"problems": [USER], "answer": "2"}, {}, "answer, problems", "source.problem=problems"),
        ({"problem": "1+1?", "answers": [2]}, {}, "answers, problem", "source.answer=answers"),
        ({"problem": "1+1?", "answers": {"value": 2}}, {}, "answers.value, problem", "source.answer=answers.value"),
        (
            {"prompt": [USER], "grading": {"kind": "", "answer": "2"}},
            {},
            "grading.answer, grading.kind, prompt",
            "grading.answer",
        ),
        ({"prompt": [USER], "reward_model": {"target": "2"}}, {}, "prompt, reward_model.target", None),
        (VERL, {"answer": "ground_truht"}, "prompt, reward_model.ground_truth", "source.answer=reward_model.ground_truth"),
    ],
)
def test_the_setting_that_is_advised_opens_the_source(tmp_path, kind, row, settings, listed, advice):
    """`Set source.problem=prompt?` and `Set source.solution=reward_model?` were followed, and every row was rejected."""
    with pytest.raises(SourceError, match=r"has no column '\w+'") as refused:
        opened(tmp_path, row, kind, **settings)
    assert listed in refused.value.what
    found = re.fullmatch(r"Set source\.(\w+)=(\S+)\?", refused.value.remedy)
    assert (found is None) == (advice is None)
    if found is not None:
        assert advice in found[0]
        [first] = opened(tmp_path, row, kind, **settings | {found[1]: found[2]}).without_solutions().rows([0])
        assert (first.problem, first.answer, first.reject) == ("1+1?", "2", None)


def test_a_written_column_is_taken_for_nothing_until_a_setting_says_what_it_is(tmp_path):
    row = {"prompt": "1+1?", "completion": [WROTE], "answer": "2"}
    [silent] = opened(tmp_path, row).rows([0])
    assert silent.reject == Reject.MISSING_SOLUTION
    assert "(source.solution=completion) or a trace (source.response=completion)" in silent.detail
    assert opened(tmp_path, row).without_solutions().rows([0])[0].reject is None
    assert opened(tmp_path, row, solution="completion").rows([0])[0].solution == "It is \\boxed{2}."
    [imported] = opened(tmp_path, row, response="completion", solution="").rows([0])
    assert (imported.imported, imported.solution, imported.reject) == (("It is \\boxed{2}.",), None, None)


def test_messages_that_end_with_the_assistant_need_a_setting(tmp_path):
    row = {"messages": [SYSTEM, USER, WROTE], "answer": 2}
    [silent] = opened(tmp_path, row).rows([0])
    assert silent.reject == Reject.BAD_MESSAGES
    assert "source.response=messages" in silent.detail
    for name, expected in (("solution", (WROTE["content"], None)), ("response", (None, (WROTE["content"],)))):
        settings = {"solution": ""} | {name: "messages"}
        [found] = opened(tmp_path, row, **settings).rows([0])
        assert (found.solution, found.imported, found.reject) == (*expected, None)
        assert (found.problem, json.loads(found.messages)) == ("1+1?", [SYSTEM, USER])
