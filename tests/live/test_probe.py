"""A probe of a place for a run leaves nothing behind."""

import re

import pytest

from pipeline.errors import StoreError
from pipeline.live.probe import judge_store
from pipeline.store.directory import Store


def test_a_place_that_can_hold_a_run(tmp_path):
    assert [line.level for line in judge_store(Store(str(tmp_path / "run")))] == ["ok", "ok"]
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot(tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "run"
    with pytest.raises(StoreError) as caught:
        judge_store(Store(str(place)))
    place, remedy = re.escape(str(place)), "Check that the place exists and its permissions"
    assert re.fullmatch(rf"{place}/doctor-\w+: cannot write \(Not a directory\)\. {remedy}", str(caught.value))
    assert (tmp_path / "file").read_text() == ""
