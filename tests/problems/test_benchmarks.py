"""Benchmarks by name: local copies of the shapes that are about, through the same mapping as the hub's."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SettingError, SourceError
from pipeline.problems.benchmarks import BENCHMARKS, benchmark, near, open_benchmark

GSM8K = [
    {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"question": "A thousand and one?", "answer": "So it is.\n#### 1,001"},
]
SHAPES = {
    "aime24": [{"id": 60, "problem": "P", "solution": r"long \boxed{204}", "answer": "204", "url": "u", "year": "2024"}] * 2,
    "aime25": [{"problem": "P", "answer": "70", "id": "0"}] * 2,
    "hmmt25": [{"problem_idx": 1, "problem": "P", "answer": r"\frac{1}{576}", "problem_type": ["Algebra"]}] * 2,
    "math500": [{"problem": "P", "solution": "s", "answer": r"\left( 3, \frac{\pi}{2} \right)", "level": 2}] * 2,
    "minerva": [{"problem": "P", "type": "astro", "solution": r"Thus \boxed{4.5e33} erg.", "idx": 0}] * 2,
    "gsm8k": GSM8K,
}
ANSWERS = {"aime24": "204", "aime25": "70", "hmmt25": r"\frac{1}{576}", "math500": SHAPES["math500"][0]["answer"]}
ANSWERS |= {"minerva": "4.5e33", "gsm8k": "4"}


def test_a_copy_at_an_address_with_credentials_is_refused_without_repeating_them():
    with pytest.raises(SettingError) as refused:
        open_benchmark("gsm8k=s3://KEY:SECRET@bucket/x.jsonl")
    assert "SECRET" not in str(refused.value)
    assert str(refused.value).startswith("the copy of openai/gsm8k in --source: the URI holds credentials")


@pytest.fixture(params=["jsonl", "parquet", "folder of splits", "saved"])
def copy_of(request, tmp_path):
    """Writes rows as a copy of one kind; returns its path."""

    def write(name, rows):
        split = BENCHMARKS[name].split
        if request.param == "jsonl":
            (tmp_path / "copy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            return tmp_path / "copy.jsonl"
        if request.param == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "copy.parquet")
            return tmp_path / "copy.parquet"
        if request.param == "saved":
            datasets.DatasetDict({split: datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "saved"))
            return tmp_path / "saved"
        (tmp_path / "data").mkdir()
        for part, content in ((split, rows), ("train" if split == "test" else "test", rows * 3)):
            (tmp_path / "data" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        return tmp_path / "data"

    return write


@pytest.mark.parametrize("name", SHAPES)
def test_a_copy_of_any_kind_gives_problem_and_answer(copy_of, name, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = open_benchmark(f"{name}={copy_of(name, SHAPES[name])}")
    assert len(found) == 2
    row = found.rows([0])[0]
    assert row.problem == SHAPES[name][0].get("question", "P")
    assert (row.answer, row.solution, row.reject) == (ANSWERS[name], None, None)


def test_a_copy_that_numbers_its_problems_asks_their_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"problem": 1, "question": "What?", "answer": 7}) + "\n")
    assert open_benchmark(f"aime24={tmp_path / 'a.jsonl'}").rows([0])[0].problem == "What?"


def test_gsm8k_keeps_what_follows_the_marks(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*GSM8K, {"question": "q", "answer": "#### "}]))
    rows = open_benchmark(f"gsm8k={tmp_path / 'a.jsonl'}").rows(range(3))
    assert [row.answer for row in rows] == ["4", "1,001", None]
    assert rows[2].reject == "missing_answer"


def test_without_a_hub_the_remedy_is_a_copy(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match=r"aime25, datasets:math-ai/aime25.*--source aime25=/path"):
        open_benchmark("aime25")


def test_a_copy_without_the_columns_says_which_there_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"task": "x", "result": "y"}\n')
    with pytest.raises(SourceError, match="there are: result, task"):
        open_benchmark(f"gsm8k={tmp_path / 'a.jsonl'}")


def test_names():
    assert benchmark("GSM8K=/x") == "gsm8k"
    assert benchmark("tiny-arithmetic") is None
    assert near("aime23") == "Did you mean 'aime24'?" or near("aime23") == "Did you mean 'aime25'?"
    assert "gsm8k" in near("zzz")
