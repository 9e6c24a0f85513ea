"""Folders of splits: the asked split is read and no other, or the splits that are there are listed."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Source
from pipeline.errors import SettingError, SourceError
from pipeline.problems.sources import open_source, stamps
from pipeline.problems.splits import split_of

HUB = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet")


def folder(root: Path, *names: str) -> str:
    """A folder with these Parquet files, each with one problem that is its name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"problem": [name], "solution": ["s"], "answer": ["1"]}), path)
    return str(root)


def read(uri: str, split: str = "train") -> list[str]:
    """The problems of a source."""
    problems = open_source(Source(uri=uri, split=split))
    return [row.problem for row in problems.rows(range(len(problems)))]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00001.parquet", ("train", "data")),
        ("data/test_sft-00000-of-00001.parquet", ("test_sft", "data")),
        ("train.parquet", ("train", "")),
        ("my_val_set.parquet", ("validation", "")),
        ("test/0000.parquet", ("test", "")),
        ("main/dev/0000.parquet", ("validation", "main")),
        ("part-0.parquet", None),
        ("trains/latest.parquet", None),
        ("contest.parquet", None),
        ("split=train/part-0.parquet", ("train", "")),
        ("math-test/part-0.parquet", ("test", "")),
        ("train2024.jsonl", ("train", "")),
        ("mathTestSet.jsonl", ("test", "")),
        ("TRAIN_data/a.parquet", ("train", "")),
    ],
)
def test_a_split_is_read_from_a_name(path, split):
    assert split_of(path) == split


def test_the_asked_split_is_read_and_no_other(tmp_path):
    uri = folder(tmp_path, *HUB)
    assert read(uri, "train") == list(HUB[:2])
    assert read(uri, "test") == [HUB[2]]
    assert read(f"{uri}/data/*.parquet", "test") == [HUB[2]]
    assert read(f"{uri}/data/test-*.parquet", "train") == [HUB[2]]  # a glob chose it
    for split in ("nonsense", "validation"):
        with pytest.raises(SourceError, match=f"has no split '{split}'; there are: test, train"):
            read(uri, split)


def test_names_of_one_split_are_one(tmp_path):
    uri = folder(tmp_path, "training/0.parquet", "dev/0.parquet")
    assert read(uri, "train") == ["training/0.parquet"]
    assert read(uri, "validation") == read(uri, "val") == ["dev/0.parquet"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train.parquet", "extra.parquet"), r"extra\.parquet: belongs to no split; other files do \(train\)"),
        (("main/train-0.parquet", "socratic/train-0.parquet"), "has split 'train' in several folders: main, socratic"),
        (("test-00000-of-00001.parquet",), "has no split 'train'; there are: test"),
        (("train.parquet", "test_of_training.parquet"), r"test_of_training\.parquet: names two splits: test, train"),
        (("train/a.parquet", "train/test_b.parquet"), r"train/test_b\.parquet: names two splits: test, train"),
        (("a.parquet", "_delta_log/0.checkpoint.parquet"), r"is a table whose log \(_delta_log/0\.checkpoint"),
        (("data/a.parquet", "metadata/v1.metadata.json"), r"is a table whose log \(metadata/v1\.metadata\.json\)"),
    ],
)
def test_what_could_be_two_things_is_refused(tmp_path, names, message):
    with pytest.raises(SourceError, match=message):
        read(folder(tmp_path, *names))


def test_a_folder_without_splits_is_read_whole_without_hidden_files(tmp_path):
    uri = folder(tmp_path, "part-0.parquet", "b/part-1.parquet", ".cache/part-2.parquet")
    assert read(uri, "nonsense") == ["b/part-1.parquet", "part-0.parquet"]


def test_a_folder_is_read_whole_or_refused(tmp_path):
    uri = folder(tmp_path, "a.parquet", "b.PARQUET", "c.pq", "_temporary/0/d.parquet", "_e.parquet")
    assert read(uri) == ["_e.parquet", "a.parquet", "b.PARQUET", "c.pq"]
    (tmp_path / "rows.JSONL").write_text("{}\n")
    with pytest.raises(SourceError, match=r"has Parquet and JSONL files, such as _e\.parquet and rows\.JSONL.*as a glob"):
        read(uri)


def test_a_star_stands_for_a_part_of_one_name_and_two_for_folders(tmp_path):
    uri = folder(tmp_path, "a.parquet", "old/b.parquet", "old/older/c.parquet")
    assert read(f"{uri}/*.parquet") == ["a.parquet"]
    assert read(f"{uri}/*/*.parquet") == ["old/b.parquet"]
    assert read(f"{uri}/**/*.parquet") == read(f"{uri}/**") == ["a.parquet", "old/b.parquet", "old/older/c.parquet"]


@pytest.mark.parametrize("uri", ["a\0b.jsonl", "caf\udce9.jsonl", "a\0/*.parquet"])
def test_a_path_that_no_file_has_is_one_line(uri):
    with pytest.raises(SourceError, match=r"source\.uri"):
        open_source(Source(uri=uri))


def test_a_name_that_stands_twice_in_a_row_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "p", "answer": "1", "solution": "s", "x": {"a": 1, "a": 2}}\n')
    with pytest.raises(SourceError, match=r"a\.jsonl:1: malformed JSON: 'a' stands twice in one object"):
        open_source(Source(uri=str(tmp_path / "a.jsonl")))
    columns = [pa.array([text]) for text in ("p", "s", "1", "2")]
    pq.write_table(pa.table(columns, names=["problem", "solution", "answer", "answer"]), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="has two columns 'answer'"):
        open_source(Source(uri=str(tmp_path / "a.parquet")))


def test_a_folder_is_no_pattern_whatever_its_name_is(tmp_path):
    uri = folder(tmp_path / "br[1]", "a.parquet")
    folder(tmp_path / "br1", "other.parquet")
    assert read(uri) == read(f"{uri}/*.parquet") == ["a.parquet"]
    assert read(f"{tmp_path}/br[1-9]/*.parquet") == ["other.parquet"]


def test_a_saved_folder_is_known_without_a_prefix_and_gives_its_splits(tmp_path):
    import datasets

    rows = [{"problem": "p", "solution": "s", "answer": "1"}]
    parts = {"train": datasets.Dataset.from_list(rows * 3), "test": datasets.Dataset.from_list(rows)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    for uri in (f"{tmp_path}/saved", f"datasets:{tmp_path}/saved"):
        assert (len(open_source(Source(uri=uri))), len(open_source(Source(uri=uri, split="test")))) == (3, 1)
        with pytest.raises(SourceError, match="has no split 'nonsense'; there are: test, train"):
            open_source(Source(uri=uri, split="nonsense"))
        assert {Path(path).suffix for path in stamps(Source(uri=uri))} == {".arrow", ".json"}


def test_an_empty_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(folder(tmp_path, "a.parquet"))
    for uri in ("", " "):
        with pytest.raises(SettingError, match=r"source\.uri: is empty"):
            open_source(Source(uri=uri))
    with pytest.raises(SettingError, match=r"source\.answer: is empty"):
        open_source(Source(uri="a.parquet", answer=""))
    with pytest.raises(SourceError, match="names no dataset"):
        open_source(Source(uri="datasets:"))
    with pytest.raises(SourceError, match="is a file, not a dataset"):
        open_source(Source(uri="datasets:a.parquet"))


def test_views_of_text_are_read(tmp_path):
    view = pa.array(["p", "q"], pa.string_view())
    pq.write_table(pa.table({"problem": view, "solution": view, "answer": view}), tmp_path / "a.parquet")
    assert read(f"{tmp_path}/a.parquet") == ["p", "q"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\x1f\x8b\x08\x00\xff", "cannot be read: Truncated"),
        ("a.json", b'{"problem": {"0": "1+1"}, "solution": {"0": "s"}, "answer": {"0": "2"}}', "is one JSON document"),
        ("a.json", b'{"problem": ["1+1"], "solution": ["s"], "answer": ["2"]}', r"orient=.records., lines=True"),
    ],
)
def test_files_of_another_shape_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        open_source(Source(uri=str(tmp_path / name)))


@pytest.mark.parametrize("uri", ["data/none.jsonl", "none.parquet", "data/none"])
def test_a_relative_path_that_is_not_there_is_told_with_its_folder(tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="does not exist") as refused:
        open_source(Source(uri=uri))
    assert str(refused.value) == f"{uri}: does not exist (relative to the folder {tmp_path}). Check source.uri"
