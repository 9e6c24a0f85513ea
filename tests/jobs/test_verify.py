"""`egrsd verify` from outside: what it says of a whole run, of a damaged one, and of one that is being worked on."""

import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from in_process import brought, planned
from rich.filesize import decimal

from jobs.status import show
from jobs.verify import AGAIN, verify_run
from pipeline.contract import TOPK
from pipeline.live import lease
from pipeline.stages import STAGES
from pipeline.store.directory import Store
from pipeline.store.manifest import Origin

STORED = Path(__file__).parent.parent / "stored_run" / "running.tar.xz"


@pytest.fixture
def store(tmp_path):
    """A whole run of two rounds."""
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    return Store(str(tmp_path / "running"))


def said(store, capfd):
    """(exit code, what is printed)."""
    try:
        verify_run(store.uri, False)
    except SystemExit as ended:
        return ended.code, "".join(capfd.readouterr())
    return 0, "".join(capfd.readouterr())


def tear(store):
    """A shard as a command leaves it in the middle of a commit: its data is there, and its old entry names other data."""
    entry = store.entry("rounds/0001", "label", "0001")
    store.delete(entry.path)


def test_a_whole_run_is_whole_also_while_a_command_works_on_it(store, capfd):
    assert said(store, capfd)[0] == 0
    with lease.held(store):
        code, text = said(store, capfd)
    assert (code, "nothing was found" in text, AGAIN in text) == (0, True, False)


@pytest.mark.parametrize("place", ["", "evals"])
def test_a_finding_in_a_live_run_comes_with_who_works_on_it(store, capfd, place):
    tear(store)
    with lease.held(Store(store.locate(place) if place else store.uri)):
        code, text = said(store, capfd)
    assert code == 1
    assert "found: " in text
    assert f"note: process {os.getpid()} on " in text
    assert f"was working on this run. A file that it was writing may be found. {AGAIN}." in text


def test_a_finding_in_a_run_that_nobody_works_on_is_a_finding(store, capfd):
    tear(store)
    store.write_json(
        lease.LEASE, {"token": "x", "holder": "process 1 on here", "host": lease.owner.host(), "pid": 2**30, "beats": 3}
    )
    code, text = said(store, capfd)
    assert (code, AGAIN in text) == (1, False)


def test_kept_tokens_that_do_not_fit_the_response_are_found(tmp_path, capfd):
    work = planned(tmp_path, "score.keep_topk=4")
    brought(work)
    work.store.save_run(work.run, {})
    assert said(work.store, capfd)[0] == 0
    entry = work.store.entry(work.area, "score", "0001")
    table = work.store.read(entry)
    ids = [[[(token + 9) % 57 for token in kept] for kept in row] for row in table["teacher_topk_tokens"].to_pylist()]
    other = table.set_column(table.schema.get_field_index(TOPK[0]), TOPK[0], pa.array(ids, table[TOPK[0]].type))
    origin = Origin(entry.settings, entry.inputs, entry.seconds, dict(entry.facts))
    work.store.commit(work.area, STAGES["score"], "0001", other, origin)
    code, text = said(work.store, capfd)
    assert code == 1
    assert "columns teacher_logprobs, teacher_topk_tokens, teacher_topk_logprobs: a token's log-prob is" in " ".join(text.split())


def test_status_says_how_many_bytes_each_stage_keeps(tmp_path, capfd):
    work = planned(tmp_path, "score.keep_topk=4")
    work.store.save_run(work.run, {})
    show(work.store.uri, False)
    assert "stored: nothing" in capfd.readouterr().out
    brought(work, "prompts", "rollout")
    show(work.store.uri, False)
    sizes = {name: sum(e.bytes for e in work.store.entries(work.area, name).values()) for name in ("prompts", "rollout")}
    assert f"stored: prompts {decimal(sizes['prompts'])}, rollout {decimal(sizes['rollout'])}" in capfd.readouterr().out
