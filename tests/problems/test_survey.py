"""What a source holds is counted and said before a run starts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.config import Source
from pipeline.errors import SourceError
from pipeline.inspection.looked import look
from pipeline.inspection.shown import show_prompts
from pipeline.overrides import resolve
from pipeline.problems import survey as rows
from pipeline.problems.sources import ProblemSet, open_source
from pipeline.problems.survey import compared, survey
from pipeline.recipes import demo
from pipeline.stages.grade import check_references

CONTROLS = re.compile("<eos>|<bos>")


def opened(path: Path, problems: list[str], answer: str | None = "1", **settings) -> ProblemSet:
    """A source of these problems."""
    rows = [{"problem": problem, "solution": "s", "answer": answer} for problem in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(Source(uri=str(path), **settings))


def test_control_tokens_and_rows_that_cannot_be_used_are_counted(tmp_path):
    found = survey(opened(tmp_path / "a.jsonl", ["1<eos>", "<bos><eos>", "2", ""]), CONTROLS)
    said = found.notes()
    assert said[0].endswith("1 of 4 rows cannot be used: 1 (column 'problem' is empty)")
    assert said[1].endswith("2 of 4 rows spell control tokens, read as text: 2 <eos>, 1 <bos>")
    found.check()


def test_a_source_of_which_no_row_can_be_used_is_refused(tmp_path):
    found = survey(opened(tmp_path / "a.jsonl", ["1", "2"], answer=None), None)
    with pytest.raises(SourceError, match="none of its 2 rows can be used: column 'answer' is empty"):
        found.check()


def test_rows_beyond_the_cap_are_said(tmp_path):
    assert opened(tmp_path / "a.jsonl", ["1", "2"]).cautions() == []
    [said] = opened(tmp_path / "a.jsonl", ["1", "2", "3"], size=2).cautions()
    assert said.endswith("the first 2 of 3 rows are used: set its size to 3 for all of them")


def test_no_advice_takes_the_rows_that_are_held_out(tmp_path):
    source = opened(tmp_path / "a.jsonl", ["1", "2", "3"], size=2)
    held_out = source.source.model_copy(update={"skip": 2, "size": None})
    [said] = source.cautions(held_out)
    assert said.endswith("the first 2 of 3 rows are used: the evaluation asks rows from 2 on")
    [said] = source.cautions(held_out.model_copy(update={"uri": "elsewhere.jsonl"}))
    assert "set its size to 3" in said


def test_rows_are_counted_from_the_front_of_the_file_whatever_is_skipped(tmp_path):
    """With `skip: 160` row 3 was line 164, and another note of the same command counted from the front."""
    path = tmp_path / "a.jsonl"
    [said] = survey(opened(path, ["0", "1", "2", "2", "x+\\oint"], skip=2), None).notes()
    assert "row (row 3; the first row is 0)" in said
    run = resolve(demo(), [f"source.uri={path}", "source.skip=2", "source.answer=problem", "grade.verifier=math"])
    assert "(row 4: " in check_references(open_source(run.source), run)
    assert [one.row for one in show_prompts(open_source(run.source), run, 1)] == [2, 2]
    first, second, third, *lines = path.read_text().splitlines()
    path.write_text("\n".join([first, second, third, *(line.replace('"answer": "1"', '"answer": ""') for line in lines)]))
    lines = look(open_source(resolve(run, ["source.answer=answer"]).source), None)
    assert [line.text for line in lines if "(row 3, 4)" in line.text]
    assert "row 0 is the first line of the file" in lines[0].text


def test_problems_that_stand_twice_are_counted(tmp_path):
    found = survey(opened(tmp_path / "a.jsonl", ["One?", "one? ", "2", "2", "2"]), None)
    [said] = found.notes()
    where = "3 of 5 rows repeat the problem of an earlier row (row 1, 3, 4; the first row is 0)"
    assert said.endswith(f"{where}. Such a problem is asked once for each of its rows")
    many = survey(opened(tmp_path / "a.jsonl", ["1"] * 9), None)
    assert "8 of 9 rows repeat the problem of an earlier row (row 1, 2, 3, 4, 5, ...; the first" in many.repeats()


def test_held_out_problems_that_are_trained_on_are_counted(tmp_path):
    training = survey(opened(tmp_path / "a.jsonl", ["One and  one?", "2+2", "3"]), None)
    held_out = survey(opened(tmp_path / "b.jsonl", ["one and one? ", "2+2", "4"]), None, most=3)
    assert [text.split(": ", 1)[1].split(" of ")[0] for text in compared(training, held_out)][1] == "2"
    assert compared(training, held_out)[0].startswith(f"note: training problems are from {training.uri}, held-out problems from")
    assert compared(training, survey(opened(tmp_path / "a.jsonl", ["5"]), None)) == []


def test_a_system_turn_and_the_spelling_of_an_accent_hide_no_problem_that_is_held_out(tmp_path):
    def turns(*texts: str) -> list[dict[str, str]]:
        roles = ["system", "user"] if len(texts) == 2 else ["user", "assistant", "user"]
        return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]

    training = survey(opened(tmp_path / "a.jsonl", [turns("Be brief.", "1+1?"), "Caf\u00e9", turns("2+2?", "4", "Why?")]), None)
    held_out = survey(opened(tmp_path / "b.jsonl", ["1+1?", "cafe\u0301", "Why?", turns("2+2?", "4", "Why?")]), None)
    assert compared(training, held_out)[1].startswith("note: 3 of 4 held-out problems of")


def test_columns_that_are_too_large_for_rewards_are_said_and_looked_at_in_the_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_OTHERS", 2)
    monkeypatch.setattr(rows, "_AT_ONCE", 2)
    path = tmp_path / "a.jsonl"
    row = {"solution": "s", "answer": "1", "story": "x" * 100, "level": 3}
    path.write_text("".join(json.dumps(row | {"problem": f"p{i}"}) + "\n" for i in range(5)))
    found = survey(open_source(Source(uri=str(path), carry_bytes=50)), None)
    assert (found.rows, dict(found.left_out)) == (5, {"story": 2})
    [said] = found.notes()
    assert said.endswith("(source.carry_bytes), among the first 2 rows: story (2 rows)")
    assert open_source(Source(uri=str(path), carry_bytes=50)).rows([0])[0].extra == '{"level": 3}'
    assert open_source(Source(uri=str(path))).rows([0], others=False)[0].extra is None


def test_rows_without_a_solution_count_where_no_teacher_needs_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"query": "p", "answer": "1"}) + "\n" + json.dumps({"query": "p", "answer": None}) + "\n")
    problems = open_source(Source(uri=str(path)))
    with pytest.raises(SourceError, match="there is no column 'solution'"):
        survey(problems, None).check()
    found = survey(problems, None, solutions=False)
    assert dict(found.rejected) == {"it has no answer": 1}
