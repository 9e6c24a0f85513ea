"""What `doctor --source` says: the columns with an example each, and the rows that will be rejected, with number and reason."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jobs.doctor import look_at_source
from jobs.settle import Choices
from pipeline.inspection.looked import look
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.problems.survey import COSTS
from pipeline.recipes import demo

TRACE = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "1+1=2#2"}]
GOOD = {"messages": TRACE, "solution": "1+1=2#2", "answer": 2, "level": 3}


def written(tmp_path, *rows) -> str:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(uri, run=None, *sets):
    settings = resolve(demo(), [f"source.uri={uri}", "rollout.group_size=2", *sets])
    return [(line.level, line.topic, line.text) for line in look(open_source(settings.source), settings if run else None)]


def test_columns_are_shown_with_an_example_and_bad_rows_with_their_number(tmp_path):
    rows = [GOOD, GOOD | {"messages": TRACE[1:]}, GOOD | {"answer": None}, GOOD | {"answer": ""}, GOOD | {"messages": None}]
    lines = said(written(tmp_path, *rows), None, "source.response=messages")
    told = {topic: text for _, topic, text in lines}
    assert told["problem"] == "column 'messages': '1+1'"
    assert told["answer"] == "column 'answer': '2'"
    assert told["response"] == "column 'messages', up to 1 imported traces a row: '1+1=2#2'"
    said_of = "kept with each row, for rewards of your own, at most 12 bytes a row"
    assert told["carried"] == f"level: {said_of}"
    assert [text for level, topic, text in lines if (level, topic) == ("warning", "rejected")] == [
        "2 of 5 rows, missing_answer (row 2, 3): column 'answer' is empty",
        "1 of 5 rows, bad_messages (row 1): column 'messages' has no user turn",
        "1 of 5 rows, missing_problem (row 4): column 'messages' is empty",
        COSTS,
    ]


def test_who_looks_for_a_row_knows_how_rows_are_counted_and_what_a_useless_one_costs(tmp_path):
    uri = written(tmp_path, GOOD, GOOD | {"answer": ""})
    texts = [text for _, _, text in said(uri, None, "source.response=messages")]
    assert "2 rows; the first 2 are looked at; row 0 is the first line of the file" in texts[0]
    assert texts[-1].startswith("a row that cannot be used takes a place in each round that asks it")
    assert COSTS not in [text for _, _, text in said(written(tmp_path, GOOD), None, "source.response=messages")]


def test_with_a_run_prompts_and_imported_traces_are_made_too(tmp_path):
    long = {"role": "assistant", "content": "1" * 100}
    rows = [GOOD, GOOD | {"messages": [TRACE[0], long]}, GOOD | {"messages": [{"role": "user", "content": "1" * 200}, TRACE[1]]}]
    lines = said(written(tmp_path, *rows), True, "source.response=messages")
    assert [text for _, topic, text in lines if topic == "rejected"] == [
        "2 of 6 traces, empty_response (row 0, 1): column 'messages' holds no such trace",
        "2 of 6 traces, prompt_too_long (row 2): 210 prompt + 72 new tokens > max_model_len 128",
        "1 of 6 traces, response_too_long (row 1): 101 tokens with the end of sequence > rollout.max_new_tokens 72",
    ]


def test_rows_without_a_solution_are_usable_where_no_teacher_reads_one(tmp_path):
    """`doctor --config mine.yaml` called all of them rejected, and ended with 1 for settings with which a run works."""
    uri = written(tmp_path, {"problem": "1+1", "answer": "2"}, {"problem": "1+1", "answer": ""})
    told = lambda *sets: [text for _, topic, text in said(uri, True, *sets) if topic == "rejected"]  # noqa: E731
    assert told()[0].startswith("2 of 2 rows, missing_solution (row 0, 1): ")
    assert told("prompts.teacher={problem}|{answer}") == [
        "1 of 2 rows, missing_answer (row 1): column 'answer' is empty",
        COSTS,
    ]


def test_the_verb_needs_neither_ray_nor_a_network_and_ends_with_1_when_nothing_is_left(tmp_path, capfd):
    uri = written(tmp_path, GOOD)
    code = f"""import sys
from jobs.doctor import look_at_source
from jobs.settle import Choices
try:
    look_at_source({uri!r}, Choices())
except SystemExit as end:
    sys.exit(40 + end.code + 10 * ('ray' in sys.modules or 'vllm' in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 41  # it ends with the assistant, and no setting says what that turn is
    assert "source.response=messages" in done.stdout
    assert "Traceback" not in done.stderr
    sets = ["source.response=messages", "rollout.group_size=1", "grade.advantage=running"]
    look_at_source(uri, Choices("demo", sets))
    assert "none of 1 traces" in capfd.readouterr().out
    with pytest.raises(SystemExit) as ended:
        look_at_source(str(tmp_path / "none.jsonl"), Choices())
    assert ended.value.code == 2
