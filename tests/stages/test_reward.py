"""Rewards of a run: the user's function on a round, its columns, what a change makes stale, and functions that fail."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from multiprocessing import forkserver

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import SETS, brought, planned, stale

from pipeline.driver import open_sources
from pipeline.errors import ContractError, SettingError, UserError
from pipeline.grader.code import codes_of
from pipeline.inspection.proof import prove
from pipeline.method.rewards import group_advantage
from pipeline.overrides import resolve
from pipeline.problems.sources import epoch_indices, open_source
from pipeline.recipes import demo
from pipeline.rounds.metrics import summarise_round
from pipeline.rounds.refused import refuse_nothing_left
from pipeline.rounds.round import evaluation_run
from pipeline.rounds.rows import joined_round
from pipeline.stages import EVALUATION, LABELS, MEASURE, PLAN, STAGES, chain_of
from pipeline.stages.reward import check, judge
from pipeline.store.shards import check_table

BREVITY = """
def brevity(completions, **columns):
    return [None if len(text) % 3 == 0 else -len(text) / 10 for text in completions]
"""
SHARDS = ("0000", "0001")


def listed(*rewards):
    return f"grade.rewards=[{', '.join(rewards)}]"


def own(file, name="brevity", **more):
    return f"{{name: {name}, function: '{file}'{''.join(f', {key}: {value}' for key, value in more.items())}}}"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "code" / "brevity.py"
    path.parent.mkdir()
    path.write_text(BREVITY)
    return path


ACCURACY, LONG = "{name: accuracy, function: accuracy}", "{name: long, function: soft_overlong, settings: {cache: 8}}"
VARIED = ["rollout.group_size=8", "rollout.max_new_tokens=20", "grade.answer_pattern=([0-9])", "grade.verifier=exact"]
SHAPE = "{name: shape, function: format, weight: 0, settings: {pattern: '(?s)[0-9+=-].*'}}"


def graded(folder, *rewards, more=()):
    work = planned(folder, listed(*rewards), *more)
    return work, brought(work, *chain_of(work.run, (*MEASURE, *LABELS)))


def test_a_run_with_rewards_stores_each_in_a_column_and_trains_on_their_weighted_sum(tmp_path, file):
    work, computed = graded(tmp_path / "run", ACCURACY, own(file, weight=0.5), SHAPE, LONG, more=VARIED)
    assert computed == [(stage.name, shard) for stage in PLAN for shard in SHARDS]
    rows = joined_round(work).to_pylist()
    for row in rows:
        text, length = row["response_text"], len(row["response_tokens"])
        assert row["reward_accuracy"] == pytest.approx((row["verdict"] == "correct") * (1 + 0.5 * (1 - length / 20)))
        assert row["reward_brevity"] == (None if len(text) % 3 == 0 else pytest.approx(-len(text) / 10))
        assert row["reward_long"] == pytest.approx(min(0.0, (20 - 8 - length) / 8))
        assert row["reward_shape"] == (re.fullmatch("[0-9+=-].*", text, re.DOTALL) is not None)
        total = row["reward_accuracy"] + 0.5 * (row["reward_brevity"] or 0) + row["reward_long"]
        assert row["reward"] == pytest.approx(total, rel=1e-5)
    assert {"correct", "wrong", "truncated"} <= {row["verdict"] for row in rows}
    assert len({row["reward_shape"] for row in rows}) == len({row["reward_long"] == 0 for row in rows}) == 2
    rewards = np.array([row["reward"] for row in rows])
    assert [row["advantage"] for row in rows] == pytest.approx(group_advantage(rewards, 8).tolist(), rel=1e-4, abs=1e-5)
    assert stale(work) == {}
    assert prove(work.store, work.run).findings == []
    figures = summarise_round(work)
    known = [row["reward_brevity"] for row in rows if row["reward_brevity"] is not None]
    assert figures["reward_brevity"] == pytest.approx(np.mean(known))
    assert figures["mean_reward"] == pytest.approx(rewards.mean())


def test_accuracy_alone_grades_as_a_run_without_rewards(tmp_path):
    work, _ = graded(tmp_path / "with", ACCURACY, more=VARIED)
    plain = planned(tmp_path / "without", *VARIED)
    brought(plain)
    names = ["trace_id", "verdict", "extracted_answer", "reward", "advantage", "reject_reason"]
    one, other = (joined_round(w).select(names) for w in (work, plain))
    assert one.equals(other)
    assert "reward" not in plain.store.names("rounds/0000")


def test_a_changed_weight_makes_only_the_sum_stale_and_an_edited_file_says_its_name(tmp_path, file):
    graded(tmp_path / "run", ACCURACY, own(file, weight=0.5))
    other = planned(tmp_path / "run", listed(ACCURACY, own(file, weight=0.7)))
    assert stale(other) == {("grade", shard): "settings" for shard in SHARDS}
    assert {name for name, _ in brought(other, *chain_of(other.run, (*MEASURE, *LABELS)))} == {"grade", "label"}
    file.write_text(f"{BREVITY}\n# edited\n")
    edited = planned(tmp_path / "run", listed(ACCURACY, own(file, weight=0.7)))
    assert stale(edited) == {("reward", shard): "reward_brevity changed" for shard in SHARDS}
    fewer = planned(tmp_path / "run", listed(ACCURACY))
    assert stale(fewer)["reward", "0000"] == "reward_brevity changed"
    none = planned(tmp_path / "run")
    assert stale(none)["grade", "0000"] == "settings"
    file.unlink()
    gone = planned(tmp_path / "run", listed(ACCURACY, own(file, weight=0.7)))
    assert stale(gone) == {}
    with pytest.raises(SettingError, match=r"grade.rewards.brevity: .*brevity.py cannot be read: No such file"):
        brought(gone, "reward", force=True)


def test_a_row_without_any_reward_is_rejected_and_a_round_without_one_is_refused(tmp_path, file):
    file.write_text("def brevity(completions, **columns):\n    return [None for _ in completions]\n")
    work, _ = graded(tmp_path / "run", own(file))
    assert set(joined_round(work)["reject_reason"].to_pylist()) == {"reward_missing"}
    with pytest.raises(UserError, match="every reward of this row is absent"):
        refuse_nothing_left(work, ("grade",))


def test_a_failing_function_rejects_the_rows_of_its_call_and_no_others(tmp_path, file):
    file.write_text(
        "def brevity(completions, problem, **columns):\n"
        "    if problem[0][0] in '13579':\n        raise KeyError('odd')\n    return [1.0] * len(completions)\n"
    )
    work, _ = graded(tmp_path / "run", own(file))
    table = joined_round(work)
    reasons = [("reward_error" if problem[0] in "13579" else None) for problem in table["problem"].to_pylist()]
    assert table["reject_reason"].to_pylist() == reasons
    assert {None, "reward_error"} == set(reasons)
    details = {detail for detail in table["reject_detail"].to_pylist() if detail}
    assert details == {"reward 'brevity': raised KeyError: 'odd'"}
    known = [row for row in table.to_pylist() if row["reject_reason"] is None]
    figures = summarise_round(work)
    assert figures["mean_length"] == np.mean([len(row["response_tokens"]) for row in known])
    assert figures["student_entropy"] == pytest.approx(np.mean(np.concatenate([row["rollout_entropy"] for row in known])))


def test_a_reward_may_decide_the_verdict(tmp_path, file):
    file.write_text("def brevity(completions, **columns):\n    return [1 if '7' in text else 0 for text in completions]\n")
    work, _ = graded(tmp_path / "run", own(file), more=["grade.verdict_reward=brevity", *VARIED])
    rows = joined_round(work).to_pylist()
    assert {row["verdict"] for row in rows} == {"correct", "wrong", "truncated"}
    for row in rows:
        if row["finish_reason"] == "length":
            assert row["verdict"] == "truncated"
        else:
            assert row["verdict"] == ("correct" if "7" in row["response_text"] else "wrong")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def brevity(completions, **c):\n    return [1.0]\n", "returned 1 values for 2 traces"),
        (
            "def brevity(completions, **c):\n    return [float('nan')] * 2\n",
            "returned nan for trace 0, which is no finite number",
        ),
        ("def brevity(completions, **c):\n    return ['good'] * 2\n", "returned 'good' (str) for trace 0, not a number or None"),
        ("def brevity(completions, **c):\n    return 'ab'\n", "returned a str, not a list of numbers"),
        ("def brevity(completions, **c):\n    import sys\n    sys.exit(3)\n", "raised SystemExit: 3"),
        ("def brevity(completions, **c):\n    import os\n    os._exit(3)\n", "its process died with exit code 3, twice"),
        ("def brevity(completions, **c):\n    while True:\n        pass\n", "a call took more than 0.7 s"),
        ("def brevity(completions, **c):\n    import time\n    time.sleep(600)\n", "a call took more than 0.7 s"),
        ("async def brevity(completions, **c):\n    return [None, 'x']\n", "returned 'x' (str) for trace 1"),
        ("def brevity(texts, **c):\n    return [1.0] * len(texts)\n", "takes no argument `completions`"),
        ("def brevity(completions, level):\n    return [1.0] * 2\n", "needs 'level', which is neither a column (answer, problem"),
        ("def other(completions):\n    pass\ndef third(completions):\n    pass\n", "defines other, third: name one, as in"),
        ("import nothing_like_this\n", "raised ModuleNotFoundError: No module named 'nothing_like_this'"),
        ("def brevity(completions\n", "is not Python: line 1: '(' was never closed"),
        ("brevity = 3\n", "defines no function: name one"),
    ],
)
def test_a_bad_function_is_refused_before_anything_starts(tmp_path, file, code, said):
    file.write_text(code)
    run = planned(tmp_path / "run", listed(own(file, deadline_s=0.7 if "0.7 s" in said else 300))).run
    with pytest.raises(SettingError) as refused:
        check(run, codes_of(run), open_source(run.source))
    assert refused.value.where == "grade.rewards.brevity"
    assert said in refused.value.what
    assert "\n" not in str(refused.value)


def test_a_good_function_passes_the_check_with_its_settings_and_columns(tmp_path, file):
    file.write_text(
        "async def anything(completions, solution, scale, *, trainer_state=None):\n    return [scale] * len(solution)\n"
    )
    run = planned(tmp_path / "run", listed(own(file, settings="{scale: 2}"))).run
    assert open_sources(run).notes == (
        f"note: grade.rewards.brevity runs {file} (sha256 {codes_of(run)['brevity'].hash}) as you, in child processes",
    )


def test_code_in_the_folder_of_the_run_is_refused(tmp_path, file):
    (tmp_path / "run").mkdir()
    inside = tmp_path / "run" / "brevity.py"
    inside.write_text(BREVITY)
    with pytest.raises(SettingError, match="lies in the folder of the run"):
        graded(tmp_path / "run", own(inside))


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        (["{name: a, function: nonsense}"], "function 'nonsense' is no module:function"),
        (["{name: a, function: 'x.py'}", "{name: a, function: 'y.py'}"], "two are named 'a'"),
        (["{name: a, function: format}"], "a: settings.pattern: Field required"),
        (["{name: a, function: format, settings: {pattern: '('}}"], "pattern is not a regular expression"),
        (["{name: a, function: soft_overlong, settings: {cache: 73}}"], "settings.cache 73 is above the limit of 72 tokens"),
        (["{name: a, function: soft_overlong, settings: {cache: '73'}}"], "settings.cache 73 is above the limit of 72 tokens"),
        (["{name: a, function: soft_overlong, settings: {cache: 9, limit: '8'}}"], "settings.cache 9 is above the limit of 8"),
        (["{name: a, function: 'x.py', weight: 0}"], "every weight is 0"),
        (["{name: a, function: 'x.py', settings: {answer: 1}}"], "settings.answer has the name of an argument"),
        (["{name: a, function: 'x.py', weight: nan}"], "finite number"),
        (["{name: A, function: 'x.py'}"], "should match pattern"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, rewards, said):
    with pytest.raises(SettingError) as refused:
        planned(tmp_path / "run", listed(*rewards))
    assert said in str(refused.value)


def test_a_verdict_reward_must_be_one_of_the_rewards(tmp_path):
    with pytest.raises(SettingError, match="verdict_reward 'b' is none of the rewards: accuracy"):
        planned(tmp_path / "run", listed(ACCURACY), "grade.verdict_reward=b")


def table_of(texts, tests):
    """The shards of prompts and rollout, one trace for each problem, with what the stage reads."""
    rows = len(texts)
    prompts = pa.table({"problem": ["p"] * rows, "solution": ["s"] * rows, "answer": tests})
    nothing = pa.array([None] * rows, pa.string())
    columns = {"trace_id": [f"{row:016x}" for row in range(rows)], "reject_reason": nothing, "reject_detail": nothing}
    columns |= {"prompt_index": pa.array(range(rows), pa.int32()), "response_text": texts, "finish_reason": ["stop"] * rows}
    return prompts, pa.table(columns | {"response_tokens": [[1, 2]] * rows})


def test_code_is_judged_by_its_tests_and_no_end_of_it_is_a_way_out():
    tests = "{name: tests, function: python_tests, settings: {column: answer, time_s: 1}}"
    run = resolve(demo(), [listed(tests), "grade.verdict_reward=tests"])
    answers = [
        "```python\ndef add(a, b):\n    return a + b\n```",
        "def add(a, b):\n    return 0",
        "while True: pass",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(1, 9)",
        "def add(a, b):\n    return a + b",
    ]
    shard = judge(*table_of(answers, ["assert add(1, 2) == 3"] * 4 + [" "]), run, codes_of(run))
    rows = shard.table.to_pylist()
    assert [row["reward_tests"] for row in rows] == [1.0, 0.0, 0.0, 0.0, None]
    assert [row["judged_verdict"] for row in rows][:4] == ["correct", "wrong", "wrong", "wrong"]
    assert [row["reject_reason"] for row in rows] == [None] * 4 + ["reward_error"]
    assert rows[4]["reject_detail"].startswith("reward 'tests': raised NoTests: the tests of a problem are no list")
    assert check_table(STAGES["reward"], shard.table) == 0
    assert [row["judged_said"] for row in rows][:2] == ["It passed 1 of 1 tests.", rows[1]["judged_said"]]
    assert "The first test that failed was 'assert add(1, 2) == 3': the program ended with an error" in rows[1]["judged_said"]


def test_code_that_no_process_could_run_is_not_wrong(monkeypatch):
    """Where no child could start, every answer of a shard was graded wrong with reward 0, without a word."""
    tests = "{name: tests, function: python_tests, settings: {column: answer, time_s: 2}}"
    run = resolve(demo(), [listed(tests), "grade.verdict_reward=tests"])

    def refuse():
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(forkserver._forkserver, "ensure_running", refuse)
    table = judge(*table_of(["def add(a, b):\n    return a + b"] * 2, ["assert add(1, 2) == 3"] * 2), run, codes_of(run)).table
    assert table["reject_reason"].to_pylist() == ["reward_error"] * 2
    assert table["reject_detail"].to_pylist() == ["reward 'tests': its process could not be started, twice"] * 2


def test_a_call_that_hangs_or_ends_its_process_rejects_its_own_row(file):
    file.write_text(
        "import os\ndef brevity(completions):\n    [text] = completions\n    while text == 'hang':\n        pass\n"
        "    if text == 'end':\n        os._exit(7)\n    return [0.25]\n"
    )
    run = resolve(demo(), [listed(own(file, per="trace", deadline_s=5)), "grade.processes=2"])
    table = judge(*table_of(["hang", "1", "end", "2"], ["1"] * 4), run, codes_of(run)).table
    assert table["reject_reason"].to_pylist() == ["reward_timeout", None, "reward_error", None]
    assert table["reward_brevity"].to_pylist() == [None, 0.25, None, 0.25]
    late, _, ended, _ = table["reject_detail"].to_pylist()
    assert late == "reward 'brevity': a call took more than 5 s (deadline_s of grade.rewards)"
    assert ended == "reward 'brevity': its process died with exit code 7, twice"


def test_the_text_of_a_file_travels_with_the_work(tmp_path, file):
    work = planned(tmp_path / "run", listed(own(file)))
    file.unlink()
    assert ("grade", "0001") in brought(work, *chain_of(work.run, MEASURE))


def test_a_module_must_be_the_drivers(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def f(completions):\n    return [0.5] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    work, _ = graded(tmp_path / "run", own("rewards_of_mine:f"))
    assert set(joined_round(work)["reward_brevity"].to_pylist()) == {0.5}
    other = {"brevity": replace(work.codes["brevity"], hash="0" * 16)}
    shard = judge(*table_of(["1"], ["1"]), work.run, other)
    assert "module rewards_of_mine of this node differs from the driver's" in shard.table["reject_detail"][0].as_py()
    run = resolve(work.run, [listed(own("no_such.module:f"))])
    with pytest.raises(SettingError, match=r"grade.rewards.brevity: there is no Python module 'no_such.module'"):
        check(run, codes_of(run), None)


def test_an_evaluation_computes_only_the_reward_that_decides_the_verdict(tmp_path, file):
    run = resolve(demo(), [listed(own(file), LONG), "evaluation.problems=4"])
    assert evaluation_run(run).grade.rewards == ()
    assert chain_of(evaluation_run(run), EVALUATION) == EVALUATION
    judged = evaluation_run(resolve(run, ["grade.verdict_reward=brevity"]))
    assert [reward.name for reward in judged.grade.rewards] == ["brevity"]
    assert chain_of(judged, EVALUATION) == ("prompts", "rollout", "reward", "grade")


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ([1.0, None], pa.float32(), None),
        ([float("nan"), 1.0], pa.float32(), "column reward_x: not finite"),
        ([1.0, 2.0], pa.float64(), "schema is"),
    ],
)
def test_a_column_of_a_single_reward_is_checked_when_it_is_committed(values, kind, said):
    nothing = pa.array([None, None], pa.string())
    columns = {"trace_id": pa.array(["a", "b"]), "reject_reason": nothing, "reject_detail": nothing}
    columns |= {"judged_verdict": pa.array(["wrong", "correct"]), "judged_answer": nothing, "reward_x": pa.array(values, kind)}
    schema = pa.schema([pa.field(name, value.type, nullable=name != "trace_id") for name, value in columns.items()])
    if said is None:
        assert check_table(STAGES["reward"], pa.table(columns, schema)) == 0
    else:
        with pytest.raises(ContractError, match=said):
            check_table(STAGES["reward"], pa.table(columns, schema))


def test_the_other_columns_of_a_source_reach_the_function_and_the_check(tmp_path, file):
    source = tmp_path / "mine.jsonl"
    rows = [{"problem": f"{n}+1", "solution": f"{n}+1#{n + 1}", "answer": str(n + 1), "level": {"hard": n % 2}} for n in range(8)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.write_text("def brevity(prompts, completions, level):\n    return [float(one['hard']) for one in level]\n")
    sets = [f"source.uri={source}", listed(own(file)), *SETS]
    work = planned(tmp_path / "run", *sets)
    assert len(check(work.run, work.codes, open_source(work.run.source))) == 1
    brought(work, *chain_of(work.run, MEASURE))
    table = joined_round(work)
    assert table["reward_brevity"].to_pylist() == [(int(text[0])) % 2 for text in table["problem"].to_pylist()]
    file.write_text("def brevity(completions, levle):\n    return levle\n")
    with pytest.raises(SettingError, match=r"needs 'levle', which is neither a column \(answer, level, problem, solution\)"):
        check(work.run, codes_of(work.run), open_source(work.run.source))


TESTS = "{name: tests, function: python_tests, settings: {column: COLUMN, time_s: 1}}"
ADDS = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]


def rows_in(path, rows):
    """The address of a file that holds the rows, as its name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("a.jsonl", ADDS),
        ("a.jsonl", json.dumps(ADDS)),
        ("a.parquet", ADDS),
        ("a.jsonl", "\n".join(["#### edge cases", *ADDS])),
    ],
)
def test_tests_in_the_column_of_answers_stay_tests(tmp_path, name, cell):
    """A list of them was joined with commas, and text was cut at `####`: no Python was left, and every trace was wrong."""
    uri = rows_in(tmp_path / name, [{"problem": "1+1", "solution": "s", "answer": cell}] * 2)
    run = resolve(demo(), [f"source.uri={uri}", listed(TESTS.replace("COLUMN", "answer")), "grade.verdict_reward=tests"])
    problems = open_source(run.source)
    assert not [note for note in check(run, codes_of(run), problems) if "cannot be read" in note]
    answers = ["def add(a, b):\n    return a + b", "def add(a, b):\n    return 3"]
    shard = judge(*table_of(answers, [row.answer for row in problems.rows([0, 1])]), run, codes_of(run))
    assert shard.table["judged_verdict"].to_pylist() == ["correct", "wrong"]


@pytest.mark.parametrize(
    ("column", "row", "said"),
    [
        ("tests", {"test_list": ADDS}, "nothing in column 'tests' (settings.column)"),
        ("test_list", {"test_list": ["assert add(1, 2) = 3"]}, "a test of a problem is no Python: 'assert add(1, 2) = 3' ("),
        ("answer", {"answer": "assert f('a'), assert f('b')"}, "a test of a problem is no Python"),
        ("tests", {"tests": {"inputs": ["1"], "outputs": ["1"], "fn_name": "add"}}, "no list of statements"),
        ("tests", {"tests": ["  "]}, "the tests of a problem are empty"),
        ("tests", {"tests": ["assert True # " + "x" * 70_000]}, "source.carry_bytes"),
    ],
)
def test_tests_that_cannot_be_read_are_refused_before_anything_starts_and_some_are_told(tmp_path, column, row, said):
    """They were looked at in the first round, after its rollouts. Tests that are no Python made every trace wrong."""
    row = {"problem": "1+1", "solution": "s", "answer": "2"} | row
    uri = rows_in(tmp_path / "a.jsonl", [row] * 3)
    run = resolve(demo(), [f"source.uri={uri}", listed(TESTS.replace("COLUMN", column)), "grade.verdict_reward=tests"])
    with pytest.raises(SettingError) as refused:
        check(run, codes_of(run), open_source(run.source))
    assert refused.value.where == "grade.rewards.tests"
    assert f"none of the first 3 problems of {uri} has tests that can be read (row 0: " in refused.value.what
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    rows_in(tmp_path / "a.jsonl", [row | {column: ADDS}, row, row])
    notes = check(run, codes_of(run), open_source(run.source))
    assert sum(f"grade.rewards.tests: 2 of the first 3 problems of {uri} have no tests" in note for note in notes) == 1


def test_tests_that_are_no_python_reject_their_row(tmp_path):
    """The row got 0, as a wrong program does."""
    run = resolve(demo(), [listed(TESTS.replace("COLUMN", "answer")), "grade.verdict_reward=tests"])
    table = judge(
        *table_of(["def add(a, b):\n    return a + b"] * 2, [ADDS[0], f"{ADDS[0]}, {ADDS[1]}"]), run, codes_of(run)
    ).table
    assert table["reject_reason"].to_pylist() == [None, "reward_error"]
    assert table["reward_tests"].to_pylist() == [1.0, None]


@pytest.mark.parametrize(
    "code",
    [
        "def brevity(completions, start):\n    return [float(one is not None) for one in start]\n",
        "def brevity(completions, start=None):\n    return [float(one is not None) for one in start]\n",
        "def brevity(completions, **columns):\n    return [float(one is not None) for one in columns['start']]\n",
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_column_without_a_value_in_a_whole_shard_is_none_in_each_row(tmp_path, file, code, name):
    """It was no column there. All rows of such a shard were rejected, and which rows that were was up to the plan."""
    file.write_text(code)
    first = epoch_indices(80, demo().seed, 0, 4).tolist()[:2]  # the rows of the first shard
    rows = [{"problem": f"{n % 9}+1", "solution": "2", "answer": "1", "start": "x" if n in first else None} for n in range(80)]
    work = planned(tmp_path / "run", f"source.uri={rows_in(tmp_path / name, rows)}", listed(own(file)), *SETS)
    work = replace(work, codes=codes_of(work.run))
    assert work.shards["0000"] == first
    brought(work, *chain_of(work.run, MEASURE))
    table = joined_round(work)
    assert table["reject_reason"].to_pylist() == [None] * 8
    assert table["reward_brevity"].to_pylist() == [1.0] * 4 + [0.0] * 4
    assert work.store.entry(work.area, "prompts", "0001").facts["absent"] == ["start"]
    assert "absent" not in work.store.entry(work.area, "prompts", "0000").facts
    late = [
        row | {"start": "x" if n > 70 else None} for n, row in enumerate(rows)
    ]  # none among the first rows that are looked at
    run = resolve(work.run, [f"source.uri={rows_in(tmp_path / f'late-{name}', late)}"])
    assert len(check(run, codes_of(run), open_source(run.source))) == 1


def test_rewards_of_a_source_without_solutions_are_tried_where_no_teacher_reads_one(tmp_path, file):
    """Each row counted as rejected, so nothing was tried. A function that raises was found after the first rollouts."""
    uri = rows_in(tmp_path / "a.jsonl", [{"problem": "1+1", "answer": "2"}] * 2)
    run = resolve(demo(), [f"source.uri={uri}", "prompts.teacher={problem}|{answer}", listed(own(file))])
    assert len(check(run, codes_of(run), open_source(run.source))) == 1
    for code, said in (
        ("completions):\n    raise KeyError('x')", "raised KeyError"),
        ("completions, tests):\n    pass", "needs 'tests'"),
    ):
        file.write_text(f"def brevity({code}\n")
        with pytest.raises(SettingError, match=said):
            check(run, codes_of(run), open_source(run.source))


def test_the_signature_is_checked_too_where_no_row_can_be_used(tmp_path, file):
    uri = rows_in(tmp_path / "a.jsonl", [{"problem": "1+1", "answer": "2", "level": 1}] * 2)
    run = resolve(demo(), [f"source.uri={uri}", listed(own(file))])
    file.write_text("def brevity(completions, level):\n    raise KeyError\n")
    assert len(check(run, codes_of(run), open_source(run.source))) == 1
    file.write_text("def brevity(completions, levle):\n    raise KeyError\n")
    with pytest.raises(SettingError, match="needs 'levle'"):
        check(run, codes_of(run), open_source(run.source))


@pytest.mark.parametrize("sets", [[], ["grade.verdict_reward=brevity"]])
def test_a_shard_without_a_live_row_is_judged(file, sets):
    """Arrow takes no rows by a list without one, so the run ended with an internal error at each resume."""
    run = resolve(demo(), [listed(own(file)), *sets])
    prompts, rollout = table_of(["1", "2"], ["1"] * 2)
    reasons = pa.array(["engine_error"] * 2)
    rollout = rollout.set_column(rollout.schema.get_field_index("reject_reason"), "reject_reason", reasons)
    table = judge(prompts, rollout, run, codes_of(run)).table
    assert table["reject_reason"].to_pylist() == ["engine_error"] * 2
    assert table["reward_brevity"].to_pylist() == [None] * 2


def test_a_verdict_that_could_never_be_correct_and_settings_that_nobody_reads_are_told(file):
    run = resolve(demo(), [listed(LONG), "grade.verdict_reward=long"])
    with pytest.raises(SettingError, match=r"grade\.verdict_reward: reward 'long' \(soft_overlong\) is never above 0"):
        check(run, codes_of(run), None)
    run = resolve(
        demo(), [listed("{name: long, function: soft_overlong, settings: {cache: 8}, deadline_s: 5, per: trace}", own(file))]
    )
    said = [note for note in check(run, codes_of(run), None) if "is not read" in note]
    assert said == [
        f"note: grade.rewards.long.{name} is not read: it is for functions of your own" for name in ("deadline_s", "per")
    ]


def test_the_annotations_of_a_function_are_what_they_are_where_its_file_is_imported(file):
    """They were texts, since the file was compiled with the future of another module."""
    file.write_text(
        "def brevity(completions: list) -> list:\n    return [float(brevity.__annotations__['completions'] is list)]\n"
    )
    run = resolve(demo(), [listed(own(file, per="trace"))])
    assert judge(*table_of(["1"], ["1"]), run, codes_of(run)).table["reward_brevity"].to_pylist() == [1.0]
