"""What scripts and habits expect of a command line: help, version, completion, JSON, a run as a plain word, streams, colours."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
import typer.main
from in_process import brought, planned

from jobs import distill
from jobs.cli import app
from jobs.screen import envelope
from jobs.screen.tables import write_csv
from jobs.screen.terminal import session, with_address
from jobs.settle import Choices, settle
from pipeline.driver import open_sources
from pipeline.errors import SettingError
from pipeline.live import lease
from pipeline.rounds import origin
from pipeline.store.directory import Store

ROOT = Path(__file__).parents[2]
ENVELOPE = {"format", "verb", "exit_code", "result", "messages", "error", "log"}


@pytest.fixture
def run(tmp_path):
    """A run with one round of fake answers."""
    work = planned(tmp_path / "runs/one")
    work.store.save_run(work.run, {})
    brought(work)
    return work.store


def given(*words):
    """The parameters that a verb would get."""
    verb, *rest = words
    return typer.main.get_command(app).commands[verb].make_context(verb, rest).params


def test_version_short_help_and_no_cut_line(egrsd):
    assert egrsd("--version").stdout == "egrsd 0.1.0\n"
    narrow = os.environ | {"COLUMNS": "80"}
    whole = egrsd("-h", env=narrow).stdout
    assert whole == egrsd("--help", env=narrow).stdout
    assert "..." not in whole.replace("[ARGS]...", "")
    assert egrsd("status", "-h").stdout.startswith("Usage: egrsd status [OPTIONS] [RUN]")


def test_completion_knows_verbs_recipes_and_settings(egrsd):
    def completed(words):
        variables = {"_EGRSD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        return egrsd(env=os.environ | variables).stdout.split()

    assert {"distill", "doctor"} <= set(completed("egrsd d"))
    assert completed("egrsd distill --recipe smol") == ["smollm2"]
    assert completed("egrsd explain rollout.temp") == ["rollout.temperature"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("status", "runs/demo"), {"run": "runs/demo"}),
        (("status", "--run", "runs/demo"), {"run": "runs/demo"}),
        (("stage", "label", "runs/demo", "--round", "0..3"), {"run": "runs/demo", "stage": "label", "round": "0..3"}),
        (("stage", "label", "--run", "label", "--round", "1"), {"run": "label", "stage": "label"}),
        (("scale", "runs/demo", "rollout=4"), {"run": "runs/demo", "sizes": ["rollout=4"]}),
        (("scale", "--run", "runs/demo", "rollout=4", "score=1"), {"run": "runs/demo", "sizes": ["rollout=4", "score=1"]}),
        (("export", "a", "--out", "a"), {"run": "a", "out": "a"}),
        (("train", "--out", "b", "a"), {"run": "a", "out": "b"}),
        (("ask", "runs/demo", "1+1"), {"run": "runs/demo", "question": "1+1"}),
        (("ask", "1+1", "--run", "runs/demo"), {"run": "runs/demo", "question": "1+1"}),
    ],
)
def test_a_run_may_be_a_plain_word(words, expected):
    found = given(*words)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("words", [("status",), ("ask", "1+1"), ("stage", "label", "--round", "0"), ("scale", "rollout=4")])
def test_a_run_is_needed(words):
    with pytest.raises(Exception, match="Missing parameter: run"):
        given(*words)


def test_every_verb_takes_json_but_none_twice():
    for name, verb in typer.main.get_command(app).commands.items():
        assert [one.opts for one in verb.params].count(["--json"]) == 1, name


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("status", "RUN"), 0),
        (("ls", "FOLDER"), 0),
        (("recipes",), 0),
        (("explain", "label.gamma"), 0),
        (("verify", "RUN"), 0),
        (("sweep", "RUN", "--sample", "0"), 0),
        (("export", "RUN", "--model", "FOLDER/out", "--merge"), 0),
        (("status", "FOLDER/nowhere"), 2),
        (("distill", "--run", "FOLDER/new"), 2),
        (("status",), 2),
        (("status", "--bogus"), 2),
        (("explain", "label.gama"), 2),
    ],
)
def test_json_is_one_document_of_one_form(egrsd, run, words, code):
    folder = str(Path(run.uri).parent)
    done = egrsd(*(word.replace("RUN", run.uri).replace("FOLDER", folder) for word in words), "--json")
    document = json.loads(done.stdout)
    assert done.returncode == document["exit_code"] == code, done.stderr
    assert document.keys() == ENVELOPE
    assert (document["format"], document["verb"]) == (envelope.FORMAT, words[0])
    assert (document["result"] is None) == (document["error"] is not None) == (code != 0)
    if code:
        assert document["error"].keys() == {"kind", "what", "where", "remedy"}
        assert done.stderr.strip()


def test_the_results_in_json_are_those_of_the_run(egrsd, run):
    listed = json.loads(egrsd("ls", str(Path(run.uri).parent), "--json").stdout)["result"]
    assert [(one["uri"], one["recipe"], one["rounds"], one["of"]) for one in listed] == [(run.uri, "demo", 0, 16)]
    seen = json.loads(egrsd("status", run.uri, "--json").stdout)["result"]
    assert seen["work"][0]["stages"]["rollout"]["rows"] == 8
    assert seen["stale"] == seen["mend"] == []


def test_an_error_goes_to_standard_error_and_the_output_stays_empty(egrsd, tmp_path):
    done = egrsd("status", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}: no run here")


def test_no_colours_without_a_terminal_or_with_no_color(egrsd, run):
    assert "\x1b" not in egrsd("status", run.uri).stdout
    code = (
        "import os, pty, sys\n"
        "os.environ['TERM'] = 'xterm-256color'\n"
        f"sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, '-m', 'jobs', 'status', {run.uri + '/nowhere'!r}])))\n"
    )

    def shown(**variables):
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=os.environ | variables,
            check=False,
        )
        return done.stdout

    assert "\x1b[31m" in shown()
    plain = shown(NO_COLOR="1")
    assert "no run here" in plain
    assert "\x1b[31m" not in plain


def test_figures_that_json_cannot_hold_are_null():
    told = envelope.Told(result={"a": [float("nan"), 1.5], "b": float("inf")})
    assert json.loads(envelope.document(told, 0))["result"] == {"a": [None, 1.5], "b": None}


def test_a_verb_that_fails_tells_its_parts(capsys):
    def verb():
        with session(debug=False) as out:
            out.say("first")
            raise SettingError("is wrong", "label.gamma", "Mend it")

    token = envelope.asked.set(envelope.Asked("status", json=True))
    try:
        with pytest.raises(SystemExit):
            verb()
    finally:
        envelope.asked.reset(token)
    document = json.loads(capsys.readouterr().out)
    assert document["messages"] == ["first"]
    assert document["error"] == {"kind": "SettingError", "what": "is wrong", "where": "label.gamma", "remedy": "Mend it"}


def test_a_command_that_is_offered_names_the_cluster_too():
    text = "stale; `egrsd stage label --run runs/a --round 0` mends it. `egrsd status --run runs/a` shows it"
    assert with_address(text) == text
    token = envelope.asked.set(envelope.Asked(address="10.0.0.1:6379"))
    try:
        assert "--run runs/a --round 0 --address 10.0.0.1:6379` mends" in with_address(text)
        assert with_address(text).count("--address") == 1
        assert with_address(with_address(text)) == with_address(text)
    finally:
        envelope.asked.reset(token)


def test_a_light_installation_says_what_is_missing():
    error = ModuleNotFoundError("No module named 'torch'", name="torch.nn")
    assert "pip install 'egrsd[cpu]'" in (envelope.lacking(error) or "")
    assert envelope.lacking(ModuleNotFoundError("x", name="jobs.nothing")) is None
    assert envelope.lacking(ValueError()) is None


def test_a_dry_run_says_what_would_be_done_and_begins_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("jobs.distill.hold", lambda *_: pytest.fail("the run is begun"))
    assert given("distill", "--run", "x", "--dry-run")["dry_run"]
    distill.distill(str(tmp_path / "run"), Choices("demo", ["seed=4"], dry=True))
    said = capfd.readouterr().out
    settings = said.partition("settings that differ from the defaults:\n")[2]
    assert "    seed: 4\n" in settings
    assert "is made anew: 16 rounds of recipe demo" in settings
    assert "Nothing was started or written. The same command without --dry-run does it." in said
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_the_command_would_refuse(tmp_path, monkeypatch, capfd):
    """It ended with 0 and named traces and tokens. The command that it offered was refused."""
    data, store = tmp_path / "mine.jsonl", Store(str(tmp_path / "run"))
    data.write_text('{"problem": "1+1", "solution": "1+1=2#2", "answer": "2"}\n' * 4)
    sizes = ["rollout.prompts_per_round=4", "rollout.prompts_per_shard=4", "evaluation.problems=0"]
    choices = Choices("demo", [f"source.uri={data}", *sizes], dry=True)
    run = settle(store, choices)
    store.save_run(run, {})
    origin.keep(store, open_sources(run).opened)
    data.write_text(data.read_text() + '{"problem": "1+2", "solution": "1+2=3#3", "answer": "3"}\n')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        distill.distill(store.uri, choices)
    assert ended.value.code == 2
    assert "has other rows than those the run was made with (4 rows before, 5 now)" in capfd.readouterr().err
    none = [*choices.sets, "source.pass_rate=0.4,0.5", "source.unmeasured=left_out"]
    with pytest.raises(SystemExit):
        distill.distill(store.uri, replace(choices, sets=none, accept_changes=True))
    assert "none of 5 problems is in [0.4, 0.5]" in capfd.readouterr().err
    distill.distill(store.uri, replace(choices, accept_changes=True))
    said = capfd.readouterr().out
    assert "note: source " in said
    assert "Nothing was started or written." in said
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    with lease.held(store):
        distill.distill(store.uri, replace(choices, accept_changes=True))
    assert f"note: process {os.getpid()} on " in capfd.readouterr().out


def test_figures_become_csv(tmp_path):
    path = tmp_path / "a.csv"
    write_csv(
        str(path), [{"objective": "opd", "accuracy": {"value": 0.5}, "seeds": [0, 1]}, {"objective": "grpo", "extra": None}]
    )
    rows = list(csv.DictReader(path.open()))
    assert rows[0] == {"objective": "opd", "accuracy.value": "0.5", "seeds.0": "0", "seeds.1": "1", "extra": ""}
    assert rows[1]["objective"] == "grpo"


def test_figures_never_take_the_place_of_a_file_of_another_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    with pytest.raises(typer.BadParameter, match=r"is there already, and is no \.csv file"):
        given("sweep", str(tmp_path), "--csv", str(data))
    with pytest.raises(typer.BadParameter, match=r"is there already, and is no \.csv file"):
        given("sweep", str(tmp_path), "--csv=~/data.jsonl")  # `write_csv` expands it, and replaced the file
    for free in (tmp_path / "new.txt", tmp_path / "a.csv", Path(os.devnull)):
        assert given("sweep", str(tmp_path), "--csv", str(free))["csv"] == str(free)


def test_credentials_in_the_address_of_a_source_are_not_shown(egrsd, tmp_path):
    """`looking at the source ...` said them, before the address was refused."""
    done = egrsd("init", str(tmp_path / "a.yaml"), "--model", "tiny-reasoner", "--source", "s3://KEY:SECRET@bucket/x.jsonl")
    assert done.returncode == 2
    assert "the URI holds credentials" in done.stderr
    assert "SECRET" not in done.stdout + done.stderr
