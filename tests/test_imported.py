"""The example of jobs/README.md for traces that somebody else wrote, through real engines, trainer and verbs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import distill, export, status, verify
from jobs.doctor import look_at_source
from jobs.settle import Choices
from pipeline.driver import open_sources
from pipeline.errors import SettingError, UserError
from pipeline.overrides import resolve
from pipeline.problems import tiny
from pipeline.recipes import demo
from pipeline.store.directory import Store

README = Path(__file__).parent.parent / "jobs" / "README.md"
IMPORTING = ["rollout.group_size=1", "grade.advantage=running", "evaluation.problems=0"]


def traces(path, change=lambda row: row, count=48) -> str:
    rows = []
    for index in range(count):
        row = tiny.problem(index, seed=0, split="train")
        turns = [{"role": "user", "content": row["problem"]}, {"role": "assistant", "content": row["solution"]}]
        rows.append(change({"messages": turns, "solution": row["solution"], "answer": row["answer"]}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_the_example_of_the_readme_learns_from_imported_traces(ray_local, trained_here, tmp_path, capfd):
    part = README.read_text().partition("### Traces that somebody else wrote")[2]
    settings = re.search(r"```yaml\n(.*?)```", part, re.DOTALL)[1]
    uri, config, run = traces(tmp_path / "traces.jsonl"), tmp_path / "imported.yaml", str(tmp_path / "imported")
    config.write_text(settings.replace("/data/traces.jsonl", uri))
    look_at_source(uri, Choices("demo", config=str(config)))
    assert "none of 48 traces" in capfd.readouterr().out
    distill.distill(run, Choices("demo", ["rollout.prompts_per_round=16"], str(config)))
    status.show(run, False)
    said = capfd.readouterr().out
    assert f"traces: imported from {uri}, column messages" in said
    assert "policies: 0 to 2." in said
    verify.verify_run(run, False)
    export.export_run(run, str(tmp_path / "out"), False)
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert {row["trace_source"] for row in rows} == {"import"}
    assert {row["verdict"] for row in rows} == {"correct"}
    assert [row["response_text"] for row in rows] == [row["solution"] for row in rows]
    assert {row["student_logprob_source"] for row in rows} == {"score"}
    distill.distill(run, Choices())
    assert "Nothing to do" in capfd.readouterr().out
    assert Store(run).latest_policy() == 2


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["rollout.teacher_share=0.5"], r"source\.response needs rollout\.teacher_share 0"),
        (
            ["objective.entropy=student", "objective.name=egrsd"],
            r"'student' needs rollout\.teacher_share 0 and no source\.response",
        ),
        (["objective.name=iw_opd"], r"'iw_opd' needs the writer's log-probs, and imported traces have none"),
        (
            ["objective.name=eopd", "score.keep_topk=16"],
            r"'ppo', which objective 'eopd' has by itself, .*: set objective\.clip=none",
        ),
        (["objective.name=opd", "objective.clip=gspo"], r"clip 'gspo' is a ratio to the policy .*: set objective\.clip=none"),
        (["objective.correction=token"], r"correction 'token' is a ratio .* nobody knows .*: set objective\.correction=off"),
        (["evaluation.source.response=x"], r"evaluation\.source\.response: an evaluation asks the model"),
    ],
)
def test_settings_that_imported_traces_cannot_have_are_refused(sets, message):
    with pytest.raises(SettingError, match=message):
        resolve(demo(), ["source.uri=x.jsonl", "source.response=messages", *IMPORTING, *sets])


def test_a_source_without_enough_usable_traces_is_refused_before_anything_starts(tmp_path):
    run = resolve(demo(), [f"source.uri={traces(tmp_path / 'a.jsonl')}", "source.response=messages", *IMPORTING])
    assert open_sources(run).notes == ()
    with pytest.raises(SettingError, match=r"source\.response: tiny-arithmetic makes problems, and brings no traces"):
        open_sources(resolve(run, ["source.uri=tiny-arithmetic"]))
    with pytest.raises(SettingError, match=r"group_size: asks for 8 of each row, .+ at most 1 trace each.+Set it to 1, with"):
        open_sources(resolve(run, ["rollout.group_size=8"]))
    with pytest.raises(UserError, match=r"all 32 imported traces of the first round are rejected, 32 as response_too_long"):
        open_sources(resolve(run, ["rollout.max_new_tokens=4"]))
    several = traces(tmp_path / "b.jsonl", lambda row: row | {"messages": row["messages"][:1], "t": [row["solution"]] * 3})
    [note] = open_sources(resolve(run, [f"source.uri={several}", "source.response=t", "rollout.group_size=2"])).notes
    assert "rows bring up to 3 traces, and the first 2 of each are used" in note


def test_a_share_of_imported_traces_of_which_none_can_be_used_is_refused(tmp_path):
    mixed = ["rollout.group_size=2", "rollout.import_share=0.5", "source.response=t", "evaluation.problems=0"]
    for text, said in (("", "48 as empty_response"), ("1" * 90, "response_too_long"), ("1+1=2\u00e9", "unknown_tokens")):
        uri = traces(tmp_path / "a.jsonl", lambda row, text=text: row | {"messages": row["messages"][:1], "t": text})
        run = resolve(demo(), [f"source.uri={uri}", *mixed, "rollout.prompts_per_round=48"])
        with pytest.raises(UserError, match="all 48 imported traces of the first round are rejected") as refused:
            open_sources(run)
        assert said in str(refused.value)
    uri = traces(tmp_path / "b.jsonl", lambda row: row | {"messages": row["messages"][:1], "t": row["solution"]})
    assert open_sources(resolve(demo(), [f"source.uri={uri}", *mixed])).notes == ()


def test_training_problems_without_solutions_are_refused_in_one_line(tmp_path):
    uri = traces(tmp_path / "a.jsonl", lambda row: {"query": row["messages"][0]["content"], "answer": row["answer"]})
    with pytest.raises(UserError, match=r"32 as missing_solution: there is no column 'solution'"):
        open_sources(resolve(demo(), [f"source.uri={uri}", "evaluation.problems=0"]))
    held_out = resolve(demo(), [f"evaluation.source.uri={uri}", "evaluation.problems=8"])
    assert len(open_sources(held_out).evals) == 48
