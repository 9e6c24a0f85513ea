"""Settings of a run that has begun: a change is refused with both values, and told where it is accepted."""

import json
import tarfile
from pathlib import Path

import pytest

from jobs.settle import Choices, settle
from pipeline.driver import Sources, cautions
from pipeline.errors import SettingError
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.problems.survey import COSTS
from pipeline.recipes import demo
from pipeline.store.directory import Store

STORED = Path(__file__).parents[1] / "stored_run" / "group.tar.xz"


def test_an_accepted_change_is_told_with_both_values(tmp_path):
    """The refusal listed them, and with --accept-changes nothing did."""
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    store, said = Store(str(tmp_path / "group")), []
    old = store.load_run().rollout.temperature
    with pytest.raises(SettingError, match=r"rollout\.temperature was .*, now 0\.5"):
        settle(store, Choices(sets=["rollout.temperature=0.5"]), said.append)
    assert said == []
    assert settle(store, Choices(sets=["rollout.temperature=0.5"], accept_changes=True), said.append).rollout.temperature == 0.5
    assert said == [f"accepted: rollout.temperature was {old!r}, now 0.5. What depends on it is made anew."]
    assert settle(store, Choices(accept_changes=True), said.append) == store.load_run()
    assert len(said) == 1


@pytest.mark.parametrize(("sets", "told"), [([], False), (["rollout.max_new_tokens=48"], True)])
def test_two_limits_of_tokens_are_said(sets, told):
    run = resolve(demo(), sets)
    sources = Sources(open_source(run.source), open_source(run.evaluation.source))
    found = [note for note in cautions(run, sources) if "at most 48 tokens in rounds and 72 in evaluations" in note]
    assert bool(found) == told


@pytest.mark.parametrize(("answer", "told"), [("2", False), ("", True)])
def test_what_a_row_costs_that_cannot_be_used_is_said_before_a_run(tmp_path, answer, told):
    """A newcomer's round trained on seven problems instead of eight, and `--dry-run` spoke of 160 rows."""
    path = tmp_path / "mine.jsonl"
    rows = [{"problem": "1+1", "solution": "1+1=2#2", "answer": "2"}, {"problem": "2", "solution": "2#2", "answer": answer}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = resolve(demo(), [f"source.uri={path}", "evaluation.problems=0"])
    said = cautions(run, Sources(open_source(run.source), None))
    assert (f"note: {path}: {COSTS}" in said) == told
