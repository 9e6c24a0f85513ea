"""Mistakes as people make them: one line that says what, where and what to do, before anything starts.

Commands that messages offer are pasted: each is parsed by the command line, with the real run in it.
"""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from in_process import brought, planned

from actors import resources
from jobs.cli import app
from jobs.ls import list_runs
from jobs.settle import Choices
from pipeline.driver import open_sources
from pipeline.errors import EgrsdError, command
from pipeline.evidence.asked import ask
from pipeline.inspection.remaining import Remaining, trainable_rounds
from pipeline.inspection.staleness import look
from pipeline.models import resolve as models
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.recipes import demo
from pipeline.rounds.round import open_round
from pipeline.rounds.rows import joined_round
from pipeline.store.directory import Store

ROOT = Path(__file__).parents[2]
PLAIN = ["evaluation.problems=0"]


def pasted(text):
    """The commands of a message, each as (verb, its parameters) by the command line itself."""
    found = []
    for offered in re.findall(r"`egrsd ([^`]*--run [^`]*)`", text):
        verb, *words = shlex.split(offered)
        found.append((verb, typer.main.get_command(app).commands[verb].make_context(verb, words).params))
    return found


def run_as_pasted(text):
    """Run the one command of a message in a process of its own, word for word."""
    [offered] = re.findall(r"`egrsd ([^`]*)`", text)
    done = subprocess.run([sys.executable, "-m", "jobs", *shlex.split(offered)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def told(call, *arguments):
    with pytest.raises(EgrsdError) as refused:
        call(*arguments)
    text = str(refused.value)
    assert "\n" not in text
    return text


@pytest.fixture
def rows(tmp_path):
    """A file of problems with columns of other names."""
    path = tmp_path / "strange.jsonl"
    path.write_text("".join(json.dumps({"task": f"{i}+1", "gold": str(i + 1)}) + "\n" for i in range(8)))
    return str(path)


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("rollout.temperature=1000", ["rollout.temperature", "less than or equal to 2", "top_k=1"]),
        ("rollout.temperature=0", ["rollout.temperature", "greater than 0", "For greedy answers set rollout.top_k=1"]),
        ("evaluation.temperature=0", ["set evaluation.top_k=1"]),
        ("model.lora_rank=1000", ["model.lora_rank", "512", "`egrsd explain model.lora_rank`"]),
        ("temperature=1", ["Did you mean 'rollout.temperature' or 'evaluation.temperature'?"]),
        ("gamma=1", ["'label.gamma' or 'objective.gamma'"]),
    ],
)
def test_a_wrong_value_says_which_setting_and_the_way_out(setting, parts):
    text = told(resolve, demo(), [setting])
    assert all(part in text for part in parts), text


def test_a_cache_that_holds_no_trace_is_refused_before_the_engines_start():
    run = resolve(demo(), [*PLAIN, "engines.rollout.kv_cache_gib=0.000001"])
    text = told(open_sources, run)
    assert "engines.rollout.kv_cache_gib: 1e-06 GiB hold no trace of 128 tokens" in text
    least = float(re.search(r"Set it to (\S+) or more", text)[1])
    open_sources(resolve(demo(), [*PLAIN, f"engines.rollout.kv_cache_gib={2 * least}"]))


def test_columns_of_an_evaluation_are_named_by_its_own_setting(rows):
    text = told(ask, demo(), rows, None, [])
    assert "Set evaluation.source.problem to" in text
    assert ask(demo(), rows, None, ["evaluation.source.problem=task", "evaluation.source.answer=gold"]).problems == 8


@pytest.mark.parametrize("path", ["models/tiny", "~/no-such-model", "./tiny", "/no/such"])
def test_a_folder_that_is_not_there_is_told_at_once(path, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "hub_answers", lambda: pytest.fail("the hub is asked for a local folder"))
    assert "there is no such folder" in told(open_sources, resolve(demo(), [*PLAIN, f"model.path={path}"]))


def test_a_model_in_the_home_is_found(tmp_path, monkeypatch):
    """`--set model.path=~/x` is no word of its own, so the shell leaves the `~` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(models.asset_path(), tmp_path / "x")
    open_sources(resolve(demo(), [*PLAIN, "model.path=~/x"]))


def test_a_hub_that_nobody_answers_for_is_not_asked_again_and_again(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    models.hub_answers.cache_clear()
    try:
        assert not models.hub_answers()
        seen = {}

        class Kind:
            """Notes how it is asked."""

            @staticmethod
            def from_pretrained(path, **options):
                seen.update(options, path=path)

        models.open_model(Kind, demo().model.model_copy(update={"path": "some/model"}), "tokenizer")
        assert seen["local_files_only"]
    finally:
        models.hub_answers.cache_clear()


def test_a_packed_file_and_a_single_document(tmp_path):
    packed = tmp_path / "a.jsonl.gz"
    with gzip.open(packed, "wt") as file:
        file.write('{"problem": "1+1", "solution": "2", "answer": "2"}\n' * 2)
    assert len(open_source(resolve(demo(), [f"source.uri={packed}"]).source)) == 2
    column = tmp_path / "columns.json"
    column.write_text(json.dumps({"problem": {"0": "1+1"}, "answer": {"0": "2"}, "solution": {"0": "2"}}))
    assert "Write one object per line" in told(open_source, resolve(demo(), [f"source.uri={column}"]).source)


# ---- commands that are offered


@pytest.fixture
def work(tmp_path):
    """A round of a run whose folder has a blank in its name, trained on by name only."""
    work = planned(tmp_path / "my runs")
    work.store.save_run(work.run, {})
    brought(work)
    return work


def test_what_is_stale_names_the_command_that_mends_it(work):
    changed = resolve(work.run, ["grade.beta_length=0"])
    [(verb, given)] = pasted("; ".join(look(work.store, changed).lines()))
    assert (verb, given["stage"], given["run"], given["round"]) == ("stage", "grade", work.store.uri, "0")


def test_a_damaged_shard_names_the_command_that_makes_it_again(work):
    entry = next(iter(work.store.entries(work.area, "grade").values()))
    work.store.write(entry.path, b"x")
    [(verb, given)] = pasted(told(joined_round, open_round(work.store, work.run, "rounds", 0)))
    assert (verb, given["stage"], given["shard"], given["force"]) == ("stage", "grade", [entry.shard], True)
    assert given["run"] == work.store.uri


def test_a_stale_round_cannot_be_trained_on_and_says_what_to_run(work):
    changed = resolve(work.run, ["grade.beta_length=0"])
    [(verb, given)] = pasted(told(trainable_rounds, work.store, changed, 0))
    assert (verb, given["stage"], given["round"]) == ("stage", "grade", "0")


def test_the_command_that_mends_what_is_stale_mends_it(work):
    run = resolve(work.run, ["grade.beta_length=0"])
    work.store.save_run(run, {})
    assert "2 shards computed" in run_as_pasted("; ".join(look(work.store, run).lines()))
    assert not any("grade" in line for line in look(work.store, run).lines())


def test_the_command_that_makes_a_damaged_shard_again_makes_the_same_bytes(work):
    entry = next(iter(work.store.entries(work.area, "grade").values()))
    whole = work.store.read_bytes(entry.path)
    work.store.write(entry.path, b"x")
    run_as_pasted(told(joined_round, open_round(work.store, work.run, "rounds", 0)))
    assert work.store.read_bytes(work.store.entry(work.area, "grade", entry.shard).path) == whole


def test_a_run_that_is_not_there_names_the_command_that_begins_one(tmp_path):
    [(verb, given)] = pasted(told(Store(str(tmp_path / "no run")).load_run))
    assert (verb, given["recipe"], given["run"]) == ("distill", "demo", str(tmp_path / "no run"))


def test_a_complete_run_offers_nothing(tmp_path):
    assert Remaining.of(Store(str(tmp_path)), resolve(demo(), PLAIN)).stale == []


def test_a_place_in_an_offered_command_is_quoted(tmp_path, capfd):
    """`egrsd ls "my runs"` offered `--run my runs/demo`, which the command line refuses."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    list_runs(str(folder), False)
    [(verb, given)] = pasted(capfd.readouterr().out)
    assert (verb, given["run"]) == ("distill", str(folder / "demo"))
    code = (path for room in ("pipeline", "actors", "jobs") for path in (ROOT / room).rglob("*.py"))
    by_hand = re.compile(r"`egrsd [^`]*--(run|out|config|address) \{")
    assert [str(path) for path in code if by_hand.search(path.read_text(encoding="utf-8"))] == []


def test_words_are_quoted_for_a_shell():
    assert command("status", "/a b/c", "--round", 3) == "`egrsd status '/a b/c' --round 3`"


def test_a_path_on_a_hub_that_cannot_be_reached_is_one_line():
    text = told(open_source, resolve(demo(), ["source.uri=hf://datasets/nobody/nothing/a.jsonl"]).source)
    assert "nobody/nothing" in text


@pytest.mark.parametrize("call", ["look_for", "open_source"])
def test_a_hub_that_refuses_the_connection_is_one_line_too(call):
    """Without HF_HUB_OFFLINE=1 the error has a class of the library that speaks HTTP."""
    code = f"from pipeline.config import Source; from pipeline.problems.sources import {call} as call\n"
    code += "try: call(Source(uri='hf://datasets/nobody/nothing/a.jsonl'))\n"
    code += "except Exception as error: print(type(error).__name__, error)"
    elsewhere = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=elsewhere, check=True)
    assert done.stdout.startswith("SourceError hf://datasets/nobody/nothing/a.jsonl: ")
    assert done.stdout.endswith("Check the network and the rights to read it\n")


def test_a_small_cluster_names_the_settings_with_which_the_demo_fits():
    node = resources.Node({"CPU": 2.0})
    text = told(resources.check, resources.demands_of(demo()), [node])
    assert "3 CPU are asked for" in text
    sets = re.findall(r"--set (\S+)", text)
    assert sets
    resources.check(resources.demands_of(resolve(demo(), sets)), [node])


def test_a_settings_file_alone_makes_a_run_and_a_recipe_is_printed_as_changed(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("rounds: 3\nmodel: {max_model_len: 100}\n")
    run = Choices(config=str(path), sets=["seed=4"]).fresh()
    assert (run.name, run.rounds, run.model.max_model_len, run.seed) == ("mine", 3, 100, 4)
    assert Choices("demo", ["seed=4"]).fresh().seed == 4
    assert "--recipe NAME" in told(Choices().fresh)
    assert "--config FILE" in told(Choices().fresh)
