"""References that mathematics cannot read are told before anything runs, and a shard counts where the verifier gave up."""

from __future__ import annotations

import json

import pytest
from waiting import until

from pipeline import notices
from pipeline.config import Grade, Run, Source
from pipeline.errors import SourceError
from pipeline.grader.verifier import Grader
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.recipes import demo
from pipeline.stages.grade import check_references


def opened(tmp_path, answers, **grade):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"problem": "p", "solution": "s", "answer": a}) + "\n" for a in answers))
    run = Run(name="x", source=Source(uri=str(path)), grade=Grade(**grade))
    return open_source(run.source), run


def test_references_that_cannot_be_read_are_told_with_an_example(tmp_path):
    note = check_references(*opened(tmp_path, ["5", r"x+\oint", r"\frac{1}{2}", "even"]))
    assert "1 of its first 4 references" in note
    assert "row 1:" in note
    assert "grade.verifier=exact" in note


def test_references_that_can_be_read_need_no_note(tmp_path):
    assert check_references(*opened(tmp_path, ["5", r"\frac{1}{2}", r"\{x \mid x > 1\}", "Monday", "#### 1,200"])) is None
    assert check_references(*opened(tmp_path, [r"x+\oint", "5"], verifier="exact")) is None


def test_a_source_without_one_reference_that_can_be_read_is_refused(tmp_path):
    with pytest.raises(SourceError, match="none of its first 2 reference answers"):
        check_references(*opened(tmp_path, [r"x+\oint", r"\oint y"]))


def test_a_verifier_that_takes_long_over_the_references_is_named(tmp_path, monkeypatch):
    said, source = [], opened(tmp_path, ["5", "6"])
    with notices.shown(said.append):
        assert check_references(*source) is None
        assert said == []
        monkeypatch.setattr(notices, "NOTICE_S", 0.05)
        monkeypatch.setattr(Grader, "unreadable", lambda *_: until(lambda: said, what="a word") and [])
        assert check_references(*source) is None
    assert said == [
        f"waiting for the verifier: it has read the first 2 reference answers of {source[0].source.uri} for 30 s so far."
    ]


def test_references_of_rows_without_a_solution_are_read_where_no_teacher_needs_one(tmp_path):
    """Such rows counted as rejected, so a source of texts passed, and every row was rejected after the first rollouts."""
    path = tmp_path / "problems.jsonl"
    path.write_text((json.dumps({"problem": "p", "answer": r"x+\oint"}) + "\n") * 2)
    run = resolve(demo(), [f"source.uri={path}", "prompts.teacher={problem}|{answer}", "grade.verifier=math"])
    with pytest.raises(SourceError, match="none of its first 2 reference answers"):
        check_references(open_source(run.source), run)
