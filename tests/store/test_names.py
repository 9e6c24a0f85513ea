"""Names from a run's folder are untrusted: none of them leads out of it, whatever a forged file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import StoreError
from pipeline.store.directory import Store
from pipeline.store.names import inside, plain

SEPARATORS = ["..", ".", "", "a", "\\", "\x00", "\n", "x" * 201, "\u202e", "a\\b", "C:"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "a\nb", "\x00", "\u202eabc", "x" * 201])
def test_a_name_of_a_file_is_plain(name):
    with pytest.raises(ValueError, match="is no plain name"):
        plain(name)


@pytest.mark.parametrize("name", ["a", "0000.json", ".DS_Store", "..a", "a..", "x" * 200, "é"])
def test_other_names_are(name):
    assert plain(name) == name


@given(st.lists(st.sampled_from(SEPARATORS) | st.text(max_size=4), max_size=5).map("/".join))
def test_a_path_that_is_taken_stays_inside(path):
    """The oracle is the file system's own reading of the path."""
    root = Path("/runs/one")
    try:
        taken = root / inside(path)
    except StoreError:
        return
    parts: list[str] = []
    for part in taken.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    assert Path(*parts).is_relative_to(root)
    assert "\x00" not in path


@pytest.mark.parametrize("path", ["../secret.json", "rounds/../../secret.json", "/secret.json", "rounds//x", "./x"])
def test_no_way_of_a_store_reads_writes_lists_or_deletes_outside(tmp_path, path):
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"a": 1}))
    store = Store(str(tmp_path / "run"))
    store.write_json("rounds/x", {})
    ways = [store.read_bytes, store.read_json, store.size, store.names, store.delete, lambda p: store.write(p, b"x")]
    for way in ways:
        with pytest.raises(StoreError, match="no plain name of a file"):
            way(path)
    assert secret.read_text() == '{"a": 1}'
    assert sorted(found.name for found in tmp_path.iterdir()) == ["run", "secret.json"]
