"""Sources: every row comes, in order, once per epoch; whatever is wrong with a file is named before it costs anything."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import until

from pipeline import notices
from pipeline.config import Source
from pipeline.contract import Reject
from pipeline.errors import SettingError, SourceError
from pipeline.problems import jsonl, tiny
from pipeline.problems.sources import epoch_indices, named, open_source

ROWS = [{"problem": f"{i}+{i}", "solution": f"It is \\boxed{{{2 * i}}}.", "answer": str(2 * i)} for i in range(25)]


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict], group: int = 4) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


@pytest.fixture(params=["jsonl", "file uri", "fsspec", "parquet", "folder", "glob", "datasets file", "datasets saved"])
def uri(request, tmp_path, monkeypatch) -> str:
    """The same 25 rows through every kind of file source."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if request.param == "jsonl":
        return write_jsonl(tmp_path / "a.jsonl", ROWS)
    if request.param == "file uri":
        return "file://" + write_jsonl(tmp_path / "a.jsonl", ROWS)
    if request.param == "fsspec":
        import fsspec

        with fsspec.open("memory://sources/a.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in ROWS)
        return "memory://sources/a.jsonl"
    if request.param == "parquet":
        return write_parquet(tmp_path / "a.parquet", ROWS)
    if request.param in {"folder", "glob"}:
        for part, rows in enumerate((ROWS[:7], ROWS[7:8], ROWS[8:])):
            write_parquet(tmp_path / "data" / f"part-{part}.parquet", rows)
        write_parquet(tmp_path / "data" / ".cache" / "other.parquet", ROWS[:3])
        return str(tmp_path / "data" / ("" if request.param == "folder" else "part-?.parquet"))
    import datasets

    if request.param == "datasets saved":
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "saved"))
        return f"datasets:{tmp_path / 'saved'}"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", ROWS)
    return f"datasets:{tmp_path / 'folder'}"


def test_rows_come_as_asked_from_every_kind(uri):
    problems = open_source(Source(uri=uri))
    assert len(problems) == 25
    asked = [24, 0, 7, 8, 7, 3]
    for found in (problems, pickle.loads(pickle.dumps(problems))):
        rows = found.rows(asked)
        assert [row.index for row in rows] == asked
        assert [(row.problem, row.solution, row.answer) for row in rows] == [tuple(ROWS[i].values()) for i in asked]
        assert all(row.reject is None for row in rows)
    assert problems.rows([]) == []
    with pytest.raises(IndexError, match="row 25 of a source of 25"):
        problems.rows([25])


def test_size_caps_a_file_and_the_fingerprint_follows_content(uri):
    source = Source(uri=uri)
    assert open_source(source).fingerprint == open_source(source).fingerprint
    capped = open_source(source.model_copy(update={"size": 10}))
    assert len(capped) == 10
    with pytest.raises(IndexError, match="row 10 of a source of 10"):
        capped.rows([10])


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_one_changed_row_changes_the_fingerprint(tmp_path, write):
    changed = [*ROWS[:-1], ROWS[-1] | {"solution": "another"}]
    first, second = (
        open_source(Source(uri=write(tmp_path / f"{name}.{write.__name__[6:]}", rows)))
        for name, rows in (("a", ROWS), ("b", changed))
    )
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_a_file_that_changes_while_it_is_read_gives_no_row_of_another_content(tmp_path, kind):
    """The new file has rows of the same length at the same places, which can be read as well as the old ones."""
    path = tmp_path / f"a.{kind}"

    def write(answer: str) -> None:
        rows = [{"problem": f"p{i}", "solution": "s", "answer": answer if i == 5 else "1"} for i in range(8)]
        if kind == "parquet":
            write_parquet(path, rows)
        else:
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)

    write("1")
    problems = open_source(Source(uri=str(path)))
    write("2")
    os.utime(path, (1, 1))  # the clock of a file is coarse
    assert problems.rows([0])[0].answer == "1"  # what has not changed is still read
    with pytest.raises(SourceError, match=r"is another one than when the file was opened.*compares all rows"):
        problems.rows([0, 5])
    write("1")
    os.utime(path, (2, 2))
    assert problems.rows([5])[0].answer == "1"  # put back
    if kind == "parquet":
        write_parquet(path, [{"problem": "p", "solution": "s", "answer": "1"}])
        with pytest.raises(SourceError, match="has other row groups than when it was opened"):
            problems.rows([5])


def test_a_parquet_file_is_read_the_same_with_and_without_its_other_columns(tmp_path):
    """The hash of a row group does not depend on the columns that are read with it."""
    turns = [[{"role": "user", "content": f"p{i}"}] for i in range(9)]
    table = pa.table(
        {
            "tests": pa.array([None, "[1]", *"abcdefg"]),
            "prompt": turns,
            "reward_model": [{"ground_truth": str(i), "style": None} for i in range(9)],
            "kind": pa.array([*"aab", *"bbccc", None]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    problems = open_source(Source(uri=str(tmp_path / "a.parquet"), solution=""))
    for others in (True, False):
        assert [row.answer for row in problems.rows(range(9), others)] == [str(i) for i in range(9)]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_rows_without_what_is_needed_stay_and_say_why(tmp_path, write):
    rows = [
        {"problem": "", "solution": "s", "answer": "1"},
        {"problem": None, "solution": "s", "answer": "1"},
        {"problem": "p", "solution": " \n", "answer": "1"},
        {"problem": "p", "solution": "s", "answer": None},
        {"problem": "p", "solution": "s", "answer": "1"},
    ]
    found = open_source(Source(uri=write(tmp_path / f"a.{write.__name__[6:]}", rows))).rows(range(5))
    assert [row.reject for row in found] == [
        Reject.MISSING_PROBLEM,
        Reject.MISSING_PROBLEM,
        Reject.MISSING_SOLUTION,
        Reject.MISSING_ANSWER,
        None,
    ]
    assert "'problem' is empty" in found[0].detail


def test_an_answer_column_of_solution_reads_the_last_box(tmp_path):
    rows = [
        {"q": "p", "s": r"\boxed{0}, no: \boxed{\frac{1}{2}}"},
        {"q": "p", "s": r"cut: \boxed{1"},
        {"q": ["chat"], "s": r"\boxed{1}"},
    ]
    uri = write_jsonl(tmp_path / "a.jsonl", rows)
    found = open_source(Source(uri=uri, problem="q", solution="s", answer="s")).rows(range(3))
    assert found[0].answer == r"\frac{1}{2}"
    assert (found[1].reject, found[1].detail) == (Reject.MISSING_ANSWER, "column 's' holds no complete \\boxed{...} and no ####")
    assert (found[2].reject, found[2].detail) == (Reject.MISSING_PROBLEM, "column 'q' holds a list, not text")


@pytest.mark.parametrize(
    ("written", "text"),
    [("3", "3"), ("3.0", "3"), ("-0.50", "-0.50"), ('"3.0"', "3.0"), ("9" * 5000,) * 2, ("true", "true")],
)
def test_numbers_in_json_become_the_text_they_were(tmp_path, written, text):
    uri = write_jsonl(tmp_path / "a.jsonl", [f'{{"problem": "p", "solution": "s", "answer": {written}}}\n'])
    assert open_source(Source(uri=uri)).rows([0])[0].answer == text


def test_a_number_that_is_carried_for_rewards_stays_what_it_is(tmp_path):
    row = '{"problem": "p", "solution": "s", "answer": "1", "tests": {"inputs": [8.0, 8], "outputs": ["8.0", 0.5]}}\n'
    found = open_source(Source(uri=write_jsonl(tmp_path / "a.jsonl", [row]))).rows([0])[0]
    assert '"inputs": [8.0, 8], "outputs": ["8.0", 0.5]' in (found.extra or "")


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array([3]), "3"),
        (pa.array([3.0]), "3"),
        (pa.array([float("nan")]), None),
        (pa.array([1000.1], pa.float32()), "1000.1"),
        (pa.array([1000.5], pa.float16()), "1000.5"),
        (pa.array([[123.45, 1e-6]], pa.list_(pa.float32())), "123.45, 1e-06"),
        (pa.array([[0.1]], pa.list_(pa.float16(), 1)), "0.1"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_numbers_in_parquet_become_text(tmp_path, column, text, kind):
    uri, table = str(tmp_path / kind), pa.table({"problem": ["p"], "solution": ["s"], "answer": column})
    pq.write_table(table, f"{uri}.parquet") if kind == "parquet" else datasets.Dataset(table).save_to_disk(uri)
    row = open_source(Source(uri=f"{uri}.parquet" if kind == "parquet" else uri)).rows([0])[0]
    assert row.answer == text
    assert (row.reject is None) == (text is not None)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_short_floats_at_any_depth_are_the_decimals_that_were_meant(tmp_path, kind):
    """123.45 in a struct was 123.44999694824219, so every right answer was wrong. The look at the first rows showed 123.45."""
    kind_of = pa.struct({"ground_truth": pa.float32(), "style": pa.string()})
    graded = pa.array([{"ground_truth": 123.45, "style": "rule"}, None], kind_of)
    deep = pa.array([[{"x": [0.1]}, None], []], pa.list_(pa.struct({"x": pa.large_list(pa.float16())})))
    table = pa.table({"problem": ["p"] * 2, "reward_model": graded, "deep": deep, "exact": [0.1 + 0.2] * 2})
    uri = str(tmp_path / f"a.{kind}")
    pq.write_table(table, uri) if kind == "parquet" else datasets.Dataset(table).save_to_disk(uri)
    rows = open_source(Source(uri=uri, solution="", answer="reward_model.ground_truth")).rows([0, 1])
    assert [row.answer for row in rows] == ["123.45", None]
    assert json.loads(rows[0].extra)["deep"] == [{"x": [0.1]}, None]
    assert json.loads(rows[0].extra)["exact"] == 0.1 + 0.2


def test_a_byte_order_mark_blank_lines_and_half_surrogates_are_survived(tmp_path):
    line = json.dumps(ROWS[0])
    broken = json.dumps(ROWS[1] | {"problem": "a\ud800b"})
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\n  \n{broken}\n{line}".encode())
    rows = open_source(Source(uri=str(tmp_path / "a.jsonl"))).rows([2, 1, 0])
    assert [row.problem for row in rows] == ["0+0", "a?b", "0+0"]
    pa.array([row.problem for row in rows])


def test_the_name_of_another_column_may_have_half_a_surrogate(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0] | {"le\ud800vel": 3}) + "\n")
    assert open_source(Source(uri=str(tmp_path / "a.jsonl"))).rows([0])[0].extra == '{"le?vel": 3}'


def test_a_time_that_python_has_no_date_for_is_named_with_its_column(tmp_path):
    """Milliseconds that are called seconds. It ended in an OverflowError."""
    late = pa.array([1_700_000_000_000] * len(ROWS), pa.timestamp("s"))
    pq.write_table(pa.Table.from_pylist(ROWS).append_column("made", late), tmp_path / "a.parquet")
    table = pa.Table.from_pylist(ROWS)
    datasets.Dataset(table.append_column("made", late)).save_to_disk(str(tmp_path / "saved"))
    for uri in (str(tmp_path / "a.parquet"), f"datasets:{tmp_path / 'saved'}"):
        with pytest.raises(
            SourceError, match=r"column 'made' holds what Python has no value for.*1 to 9999.*take the column out"
        ):
            open_source(Source(uri=uri))
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff"))
    pq.write_table(table.slice(0, 1).append_column("note", broken), tmp_path / "b.parquet")
    with pytest.raises(SourceError, match="column 'note' holds text that is no UTF-8"):
        open_source(Source(uri=str(tmp_path / "b.parquet")))


GOOD = json.dumps(ROWS[0]) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.jsonl: is empty"),
        (b"\n \n", r"a\.jsonl: is empty"),
        (GOOD.encode() * 2 + b'{"problem": "x",\n', r"a\.jsonl:3: malformed JSON: .+ at column \d+"),
        (GOOD.encode() + b"\n[1, 2]\n", r"a\.jsonl:3: holds a JSON list, not an object"),
        (GOOD.encode() + b'"text"\n', r"a\.jsonl:2: holds a JSON str"),
        (GOOD.encode() + '{"problem": "é"}'.encode("latin-1"), r"a\.jsonl:2: is not UTF-8 text"),
        (GOOD.encode("utf-16"), r"a\.jsonl:1: is not UTF-8 text"),
        (b"[" * 100_000, r"a\.jsonl:1: malformed JSON: nested too deeply"),
        (b'{"question": "p", "solution": "s", "anwser": "1"}', r"no column 'answer'; there are: anwser, question, solution"),
        (b'{"problem": "p", "solution": "s", "anwser": "1"}', r"no column 'answer'.+Set source\.answer=anwser\?"),
    ],
)
def test_a_bad_jsonl_file_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(Source(uri=str(tmp_path / "a.jsonl")))
    assert caught.value.exit_code == 2


def test_other_unreadable_sources_are_the_users_mistake(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 this is none")
    whole = Path(write_parquet(tmp_path / "cut.parquet", ROWS)).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    write_parquet(tmp_path / "columns.parquet", [{"problem": "p", "solutions": "s"}])
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in ROWS[0]}), tmp_path / "empty.parquet")
    (tmp_path / "bare").mkdir()
    for name, message in {
        f"{tmp_path}/none.jsonl": "does not exist",
        f"{tmp_path}/none.parquet": "does not exist",
        f"{tmp_path}/none-*.parquet": "no file, folder or kind",
        f"{tmp_path}/bare": "no file, folder or kind",
        f"{tmp_path}/bare.jsonl.gz": "does not exist",
        f"{tmp_path}/no.parquet": "not a readable Parquet file",
        f"{tmp_path}/cut.parquet": "not a readable Parquet file",
        f"{tmp_path}/columns.parquet": r"no column 'solution'.+source\.solution=solutions\?",
        f"{tmp_path}/empty.parquet": "is empty",
        "ftps3://bucket/a.parquet": "cannot be opened",
        "something else": "no file, folder or kind",
        f"datasets:{tmp_path}/bare": "cannot be loaded",
        "reasoning-gym:chain_sums": "no task 'chain_sums'.+chain_sum",
    }.items():
        with pytest.raises(SourceError, match=message) as caught:
            open_source(Source(uri=name))
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("role", ["problem", "solution", "answer", "response", "teacher"])
def test_a_later_file_without_a_column_is_named(tmp_path, role):
    """A trace or a teacher that only the first file had ended in a KeyError."""
    row = {"problem": "p", "solution": "s", "answer": "1", "response": "t", "teacher": "a"}
    write_parquet(tmp_path / "data" / "part-0.parquet", [row])
    later = write_parquet(tmp_path / "data" / "part-1.parquet", [{name: value for name, value in row.items() if name != role}])
    with pytest.raises(SourceError, match=rf"part-1\.parquet: has no column '{role}'.*source\.{role}") as caught:
        open_source(Source(uri=str(tmp_path / "data"), response="response", teacher="teacher"))
    assert later in str(caught.value)


def test_a_damaged_row_group_is_found_when_the_file_is_opened(tmp_path):
    path = Path(write_parquet(tmp_path / "a.parquet", ROWS))
    content = bytearray(path.read_bytes())
    content[60:80] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"row group|readable"):
        open_source(Source(uri=str(path)))


def test_a_split_that_a_dataset_lacks_is_named(tmp_path):
    import datasets

    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(SourceError, match="split 'test'"):
        open_source(Source(uri=f"datasets:{tmp_path / 'saved'}", split="test"))
    with pytest.raises(SettingError, match=r"source\.options\.trust_remote_code"):
        open_source(Source(uri=f"datasets:{tmp_path / 'saved'}", options={"trust_remote_code": True}))


def test_a_task_makes_no_more_problems_than_can_be_put_in_order():
    with pytest.raises(SettingError, match=r"source\.size: tiny-arithmetic makes at most 1000000000 problems"):
        open_source(Source(uri="tiny-arithmetic", size=10**12))


def test_the_tiny_task_comes_as_its_module_makes_it():
    problems = open_source(Source(seed=3, size=50))
    assert len(problems) == 50
    row = problems.rows([7])[0]
    assert {"problem": row.problem, "solution": row.solution, "answer": row.answer} == tiny.problem(7, 3, "train")
    assert problems.fingerprint != open_source(Source(seed=4, size=50)).fingerprint
    with pytest.raises(SettingError, match=r"source\.options\.terms: unknown option"):
        open_source(Source(options={"terms": 3}))


@pytest.mark.parametrize(("seed", "start", "count"), [(0, 0, 40), (1, 13, 1), (2, 9, 21)])
def test_epochs_hold_every_row_once(seed, start, count):
    whole = epoch_indices(10, seed, 0, 60)
    for epoch in range(6):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert not np.array_equal(whole[:10], whole[10:20])
    np.testing.assert_array_equal(epoch_indices(10, seed, start, count), whole[start : start + count])


@given(
    size=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 500),
    cuts=st.lists(st.integers(0, 60), min_size=1, max_size=5),
)
def test_an_order_read_in_pieces_is_the_order_read_at_once(size, seed, start, cuts):
    places = start + np.concatenate([[0], np.cumsum(cuts)])
    parts = [epoch_indices(size, seed, int(at), cut) for at, cut in zip(places, cuts, strict=False)]
    whole = epoch_indices(size, seed, start, sum(cuts))
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    first = -start % size  # drop up to the next epoch's start, then every full epoch is a permutation
    for at in range(first, len(whole) - size + 1, size):
        assert sorted(whole[at : at + size]) == list(range(size))


def test_the_order_never_changes():
    """A resumed run relies on it, so it may not follow numpy's or our own taste."""
    assert epoch_indices(8, 1, 0, 8).tolist() == [6, 3, 7, 1, 4, 0, 2, 5]
    with pytest.raises(ValueError, match="no positions"):
        epoch_indices(0, 0, 0, 1)


def test_a_source_that_takes_long_is_named(tmp_path, monkeypatch):
    said, uri, opened = [], write_jsonl(tmp_path / "slow.jsonl", ROWS), jsonl.open_jsonl
    source = Source(uri=uri, problem="problem", solution="solution", answer="answer")
    with notices.shown(said.append):
        assert len(open_source(source)) == 25
        assert said == []
        monkeypatch.setattr(notices, "NOTICE_S", 0.05)
        monkeypatch.setattr(jsonl, "open_jsonl", lambda *asked: until(lambda: said, what="a word") and opened(*asked))
        assert len(open_source(source)) == 25
    assert said == [f"waiting for the problems of {uri}: they have been read for 30 s so far."]


@pytest.mark.parametrize("codec", ["gzip", "bz2", "zstd", "lz4"])
def test_compressed_lines_are_read_as_plain_ones(tmp_path, codec):
    plain = write_jsonl(tmp_path / "a.jsonl", [*ROWS, ""])
    named = tmp_path / f"b.jsonl{ {'gzip': '.gz', 'bz2': '.bz2', 'zstd': '.zst', 'lz4': '.lz4'}[codec] }"
    data = Path(plain).read_bytes()
    with pa.CompressedOutputStream(str(named), codec) as stream:
        stream.write(data)
    problems, same = open_source(Source(uri=str(named))), open_source(Source(uri=plain))
    assert problems.fingerprint == same.fingerprint
    asked = [24, 0, 7, 7, 8, 3]
    assert pickle.loads(pickle.dumps(problems)).rows(asked) == same.rows(asked)
    whole = named.read_bytes()
    named.write_bytes(whole[:-20])
    with pytest.raises(SourceError, match="cannot be read"):
        open_source(Source(uri=str(named)))
    with pytest.raises(SourceError, match="has changed since it was opened"):
        problems.rows([24])


def test_compression_is_known_by_content_and_what_cannot_be_unpacked_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(pa.compress(json.dumps(ROWS[0]).encode(), "gzip", asbytes=True))
    assert len(open_source(Source(uri=str(tmp_path / "a.jsonl")))) == 1
    (tmp_path / "b.jsonl.gz").write_text(json.dumps(ROWS[0]))
    assert len(open_source(Source(uri=str(tmp_path / "b.jsonl.gz")))) == 1
    (tmp_path / "c.jsonl").write_bytes(b"\xfd7zXZ\x00 and more")
    with pytest.raises(SourceError, match=r"is compressed with xz\. Unpack it"):
        open_source(Source(uri=str(tmp_path / "c.jsonl")))


def test_a_folder_of_lines_has_splits_too(tmp_path):
    (tmp_path / "data").mkdir()
    for name, rows in {"train-0.jsonl": ROWS[:7], "train-1.jsonl": ROWS[7:20], "test.jsonl": ROWS[20:]}.items():
        write_jsonl(tmp_path / "data" / name, rows)
    (tmp_path / "data" / "dataset_infos.json").write_text("{}")
    training = open_source(Source(uri=str(tmp_path / "data")))
    assert [row.answer for row in training.rows(range(20))] == [row["answer"] for row in ROWS[:20]]
    assert len(open_source(Source(uri=str(tmp_path / "data"), split="test"))) == 5
    assert len(open_source(Source(uri=f"{tmp_path}/data/train-*.jsonl", size=9))) == 9
    assert open_source(Source(uri=f"{tmp_path}/data/train-*.jsonl", size=9)).total == 20
    with pytest.raises(SourceError, match="has no split 'dev'; there are: test, train"):
        open_source(Source(uri=str(tmp_path / "data"), split="dev"))


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("mine.jsonl", "mine.jsonl"),
        ("s3://bucket/a.jsonl.gz", "s3://bucket/a.jsonl.gz"),
        ("a.parquet", "a.parquet"),
        ("data/*.jsonl", "data/*.jsonl, split train"),
        ("folder", "folder, split train"),
        ("datasets:gsm8k", "datasets:gsm8k, split train"),
    ],
)
def test_a_single_file_is_named_without_a_split(uri, said):
    assert named(Source(uri=uri)) == said
