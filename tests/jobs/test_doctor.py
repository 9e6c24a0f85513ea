"""The doctor as a user runs it."""

import json

import pytest
from waiting import until

from actors import cluster, resources
from jobs import doctor
from pipeline import notices, recipes
from pipeline.driver import open_sources
from pipeline.errors import ModelError, UnreachableError
from pipeline.fit.machine import Facts, Line
from pipeline.live.probe import judge_store
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.overrides import resolve
from pipeline.problems.survey import survey
from pipeline.rounds.round import evaluation_run
from pipeline.stages.prompts import prompts
from pipeline.store.directory import Store


def test_the_disk_is_that_of_the_run(tmp_path):
    assert doctor.nearest_folder(Store(str(tmp_path / "not" / "yet" / "there"))) == str(tmp_path)
    assert doctor.nearest_folder(None) == "."


def test_an_error_that_is_understood_is_a_finding():
    def refuse():
        raise ModelError("is not here", "model", "Download it")

    [line] = doctor.judge("tokenizer", refuse)
    assert (line.level, line.topic, line.text) == ("error", "tokenizer", "model: is not here. Download it")


def test_what_only_an_unreachable_hub_knows_is_a_warning():
    def refuse():
        raise UnreachableError("no model here", "some/model", "Download it")

    [line] = doctor.judge("tokenizer", refuse)
    assert (line.level, line.topic) == ("warning", "tokenizer")
    assert line.text.startswith("some/model: not checked: no folder here has this name, the hub cannot be reached")


HERE = Facts("3.11.9", {}, 2, frozenset(), *[64 * 2**30] * 3, (), {})


@pytest.mark.parametrize(
    ("recipe", "address", "gpu_build", "asked"),
    [
        ("qwen3_8b", "10.0.0.1:6379", True, "the cluster"),
        ("demo", "10.0.0.1:6379", True, "the cluster"),  # the GPU build needs a card for it too
        ("demo", "10.0.0.1:6379", False, "this machine"),
        ("qwen3_8b", None, False, "this machine"),
        ("qwen3_8b", None, True, "nobody"),
        ("demo", None, True, "nobody"),
    ],
)
def test_the_engine_of_the_check_starts_where_a_run_would_start_it(recipe, address, gpu_build, asked, monkeypatch):
    for module in (doctor.machine, resources):
        monkeypatch.setattr(module, "vllm_for_gpus", lambda: gpu_build)
    monkeypatch.setattr(cluster, "entropy_there", lambda run: Line("ok", "exact entropy", "the cluster"))
    monkeypatch.setattr(doctor, "judge_entropy", lambda run, gpus: Line("ok", "exact entropy", "this machine"))
    line = doctor.judge_hook(recipes.recipe(recipe), HERE, address, debug=False)
    if asked == "nobody":
        assert line.level == "warning"
        assert "Run this with --address" in line.text
    else:
        assert line.text == asked


def test_a_place_that_cannot_hold_a_run_is_one_error_line(tmp_path):
    (tmp_path / "file").write_text("")
    [line] = doctor.judge("store", lambda: judge_store(Store(str(tmp_path / "file" / "run"))))
    assert (line.level, line.topic) == ("error", "store")
    assert "cannot write (Not a directory)" in line.text


def test_a_reward_that_is_missing_is_one_error_line(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(completions):\n    return [1.0] * len(completions)\n")
    run = resolve(recipes.demo(), [f"grade.rewards=[{{name: mine, function: '{tmp_path / 'mine.py'}'}}]"])
    [line] = doctor.judge("rewards", lambda: doctor.judge_rewards(run, None))
    assert (line.level, line.topic) == ("ok", "rewards")
    assert "grade.rewards.mine runs" in line.text
    (tmp_path / "mine.py").unlink()
    [line] = doctor.judge("rewards", lambda: doctor.judge_rewards(run, None))
    assert line.level == "error"
    assert "grade.rewards.mine: " in line.text
    assert doctor.judge_rewards(recipes.demo(), None) == []


def test_a_reward_that_lies_in_the_runs_folder_is_not_run(tmp_path):
    """`egrsd doctor --run` of a run that somebody sent ran the code that lay beside it. `distill` refused it."""
    file = tmp_path / "run" / "theirs.py"
    file.parent.mkdir()
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef theirs(completions):\n    return [1.0] * len(completions)\n")
    run, store = resolve(recipes.demo(), [f"grade.rewards=[{{name: theirs, function: '{file}'}}]"]), Store(str(file.parent))
    for find in (doctor.judge_rewards, lambda *of: doctor.judge_settings(of[0], doctor.Choices("demo"), False, of[1])):
        [line] = doctor.judge("rewards", lambda find=find: find(run, store))
        assert line.level == "error"
        assert "lies in the folder of the run" in line.text
    assert not (tmp_path / "ran").exists()


def test_held_out_problems_need_no_solutions(tmp_path):
    """`distill` took rows with problem and answer alone, and `doctor` said that none of them can be used."""
    rows = [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(6)]
    for name, more in (("none.jsonl", [{}] * 6), ("some.jsonl", [{"solution": "It is so."}] * 2 + [{"solution": None}] * 4)):
        (tmp_path / name).write_text("".join(json.dumps(row | one) + "\n" for row, one in zip(rows, more, strict=True)))
        held_out = resolve(recipes.demo(), [f"evaluation.source.uri={tmp_path / name}", "evaluation.problems=6"])
        [line] = [line for line in doctor.judge_sources(held_out) if line.topic == "held out"]
        assert line.level == "ok"
        assert line.text.endswith("6 rows, of which 6 are asked and 6 can be used")
        assert survey(open_sources(held_out).evals, None).rejected.total() == 0
        table = prompts(open_sources(held_out).evals.rows(range(6)), evaluation_run(held_out), tokenizer_of(held_out.model))
        assert table["reject_reason"].null_count == 6


def test_a_check_that_takes_long_names_who_is_waited_for(monkeypatch):
    said = []
    with notices.shown(said.append):
        assert doctor.judge("tokenizer", list) == []
        assert said == []
        monkeypatch.setattr(notices, "NOTICE_S", 0.05)
        assert doctor.judge("exact entropy", lambda: until(lambda: said, what="a word") and [], "a real engine to start") == []
    assert said == ["exact entropy: waiting for a real engine to start, for 30 s so far."]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("recipe", "code", "said"), [("nope", 2, "unknown recipe"), ("qwen3_8b", 1, "error    resources"), ("demo", 0, "0 errors")]
)
def test_the_verb(vllm_forks, recipe, code, said):
    done = vllm_forks.egrsd("doctor", "--recipe", recipe)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout + done.stderr


@pytest.mark.timeout(1500)
def test_a_source_that_a_set_line_names_is_looked_at_without_a_file(vllm_forks, tmp_path):
    done = vllm_forks.egrsd("doctor", "--set", f"source.uri={tmp_path / 'nope.jsonl'}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error    source" in done.stdout
    assert "nope.jsonl" in done.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("objective.window=5", "objective.window"),
        ("prompts.system=Be brief.", "chat template"),
    ],
)
def test_the_doctor_refuses_what_distill_refuses_before_it_starts(line, message):
    """It rendered prompts only for a source of its own, and never looked at settings that nobody reads."""
    sets = ("objective.name=grpo", line) if line.startswith("objective") else (line,)
    run = resolve(recipes.demo(), list(sets))
    [found] = doctor.judge("settings", lambda: doctor.judge_settings(run, doctor.Choices("demo", sets), False, None))
    assert (found.level, found.topic) == ("error", "settings")
    assert message in found.text


def test_settings_with_which_a_run_would_start_are_said_to():
    [found] = doctor.judge_settings(recipes.demo(), doctor.Choices("demo"), False, None)
    assert found == Line("ok", "settings", "a run would start with them")
