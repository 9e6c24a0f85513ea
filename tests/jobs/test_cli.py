"""The command line: instant help, errors as one line with an exit code, nothing started for a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import recipes
from pipeline.store.directory import Store

ROOT = Path(__file__).parents[2]
HEAVY = ("ray", "torch", "vllm", "transformers", "pydantic", "pyarrow", "numpy")


@pytest.fixture
def empty_run(tmp_path):
    """A run whose first round is planned and nothing more."""
    store = Store(str(tmp_path / "run"))
    store.save_run(recipes.demo(), {})
    store.write_json("rounds/0000/plan.json", {"policy": 0, "shards": {"0000": [0, 1]}, "source": ""})
    return store


@pytest.mark.parametrize(
    ("modules", "heavy"), [("jobs.cli", HEAVY), ("jobs.distill, jobs.report, jobs.status, jobs.verify", HEAVY[:4])]
)
def test_help_and_verbs_that_only_read_import_nothing_heavy(modules, heavy):
    code = f"import sys, {modules}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_python_that_lacks_the_packages_is_named():
    """A job runs with the `python` of the head. It ended with a traceback: No module named 'typer'."""
    command = [sys.executable, "-S", "-m", "jobs", "status", "runs/demo"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {sys.executable} has no package typer. Install egrsd for it, or")
    assert len(done.stderr.splitlines()) == 1


def test_help_lists_every_verb(egrsd):
    done = egrsd("--help")
    assert done.returncode == 0
    for verb in ("distill", "stage", "train", "evaluate", "compare", "sweep", "report", "status", "export", "recipes"):
        assert verb in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recipes", "--show", "dem"), "unknown recipe 'dem'. Did you mean 'demo'?"),
        (("distill", "--run", "RUN", "--recipe", "nope"), "unknown recipe 'nope'"),
        (("distill", "--run", "NEW"), "a new run needs a recipe"),
        (("distill", "--run", "NEW", "--recipe", "demo", "--recipe", "smollm2"), "--recipe is given twice"),
        (("distill", "--run", "NEW", "--recipe", "demo", "--config", "a.yaml", "--config=b.yaml"), "--config is given twice"),
        (("distill", "--run", "NEW", "--recipe", "demo", "--run", "OUT"), "--run is given twice"),
        (("evaluate", "--run", "RUN", "-k", "1", "-k", "2"), "-k is given twice"),
        (("distill", "--run", "NEW", "--recipe", "demo", "--set", "seed=1", "--set", "seed=2"), "--set seed is given twice"),
        (
            ("distill", "--run", "NEW", "--recipe", "demo", "--set", "label={gamma: 1}", "--set", "label.gamma=2"),
            "--set label.gamma is",
        ),
        (("distill", "--run", "NEW", "--recipe", "demo", "--set", "label.gama=1"), "Did you mean 'label.gamma'?"),
        (("distill", "--run", "NEW", "--recipe", "demo", "--set", "rounds=many"), "rounds: Input should be a valid integer"),
        (("distill", "--run", "NEW", "--recipe", "demo", "--config", "nowhere.yaml"), "cannot read the configuration"),
        (("distill", "--run", "RUN", "--set", "rounds=3"), "made with other settings: rounds was 16, now 3"),
        (("distill", "--run", "NEW", "--recipe", "demo", "--set", "source.uri=/no/such.jsonl"), "/no/such.jsonl"),
        (("distill", "--run", "NEW", "--recipe", "demo", "--set", "model.path=/no/such/model"), "/no/such/model"),
        (("stage", "lable", "--run", "RUN", "--round", "0"), "unknown stage 'lable'. Did you mean 'label'?"),
        (("stage", "label", "--run", "RUN", "--round", "7"), "no round 7"),
        (("stage", "label", "--run", "RUN", "--round", "0", "--set", "rollout.temperature=2"), "stage label does not read this"),
        (("train", "--run", "RUN"), "round 0 is not measured"),
        (("train", "--run", "RUN", "--set", "label.gamma=1"), "training does not read this setting"),
        (("export", "--run", "RUN", "--out", "OUT"), "no round has all its traces yet"),
        (("distill",), "Missing option"),
        (("stage", "label", "--run", "RUN", "--set", "label.gamma=1"), "'--round' is missing: 3, 0,2 or 0..15."),
        (("status", "--run", "gopher://x/y"), "cannot be opened"),
        (("distill", "--run", "NEW", "--recipe", "demo", "--set", "grade.answer_pattern=("), "grade.answer_pattern"),
        (("distill", "--run", "NEW", "--recipe", "demo", "--address", "127.0.0.1:1"), "no Ray cluster answers"),
        (("report", "--run", "RUN"), "nothing to report: no round has graded and scored traces"),
        (("report", "--run", "NEW"), "no run here"),
        (("report", "--run", "RUN", "--compare", "OUT"), "no comparison here: compare.json is missing"),
        (("report", "--run", "RUN", "--out", "OUT/"), "is a folder"),
        (("sweep", "--run", "RUN"), "no round is labelled"),
        (("sweep", "--run", "RUN", "--set", "label.gama=0,1"), "Did you mean 'label.gamma'?"),
        (("sweep", "--run", "RUN", "--set", "rollout.temperature=1,2"), "labels do not read this setting"),
        (("sweep", "--run", "RUN", "--set", "label.gamma=0,,1"), "an axis of the grid is written name=value,value"),
        (("sweep", "--run", "RUN", "--set", "label.gamma"), "an axis of the grid is written name=value,value"),
        (("sweep", "--run", "RUN", "--set", "label.gamma=0,much"), "label.gamma: Input should be a valid number"),
        (("sweep", "--run", "RUN", "--set", "label.window=1", "--set", "profile.window=2"), "profile.window: is given twice"),
        (("sweep", "--run", "RUN", "--set", "profile.tau_low=.2,.3"), "tau_low 0.2 must be below tau_high 0.17"),
        (("distill", "--run", "RUN", "--recipe", "smollm2"), "this run was started from recipe 'demo'"),
        (("evaluate", "--run", "RUN", "--policy", "0,7"), "policy 7 is not published. Policies here: 0 to 0"),
        (("evaluate", "--run", "RUN", "--policy", "first"), "'first' is no number or range of numbers"),
        (("evaluate", "--run", "RUN", "--policy", "0", "-k", "0"), "-k: is 0"),
        (("evaluate", "--run", "RUN", "--source", "gsm8"), "--source gsm8: is no benchmark, file, folder or kind of source. Did"),
        (("evaluate", "--run", "RUN", "--set", "evaluation.problems=1"), "too few for an interval"),
        (("evaluate", "--run", "RUN", "--set", "train.learning_rate=1"), "evaluation does not read this setting"),
        (("evaluate", "--run", "RUN", "-k", "4", "--set", "evaluation.samples=2"), "fewer than -k 4"),
        (("compare", "--out", "OUT", "--objectives", "grpo,egrds"), "unknown objective 'egrds'. Did you mean 'egrsd'?"),
        (("compare", "--out", "OUT", "--seeds", "0-4"), "'0-4' is no number or range of numbers. Write it as 0..4"),
        (("compare", "--out", "OUT", "--seeds", "4..0"), "4..0 holds nothing"),
        (("compare", "--out", "OUT", "--set", "evaluation.problems=1"), "1 problems are too few for an interval"),
        (("compare", "--out", "OUT", "--baseline", "rlsd", "--objectives", "grpo"), "'rlsd' is not compared"),
        (("compare", "--out", "OUT", "--objectives", "shuffled", "--set", "objective.name=grpo"), "'grpo' has no gate"),
        (("compare", "--out", "OUT", "--csv", "nowhere/a.csv"), "--csv nowhere/a.csv: cannot be written (there is no folder "),
        (("stage", "grade", "--run", "RUN", "--diff", "--shard", "0001"), "--shard and --address do not go with --diff"),
        (("train", "--run", "RUN", "--out", "OUT", "--replace"), "--replace is about policies of this run"),
        (("report", "--run", "RUN", "--serve", "--out", "OUT"), "--out and --replace do not go with --serve"),
        (("report", "--run", "RUN", "--port", "8000"), "--port belongs to --serve"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(egrsd, empty_run, tmp_path, arguments, message):
    named = {"RUN": empty_run.uri, "NEW": str(tmp_path / "new"), "OUT": str(tmp_path / "out")}
    done = egrsd(*(named.get(argument, argument) for argument in arguments))
    said = " ".join((done.stdout + done.stderr).split())
    assert message in said
    assert "error: " in said
    assert "Invalid value: " not in said  # a missing option is no value
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 2


def test_without_a_word_the_help_is_shown_once(egrsd):
    """It was followed by an error that had the whole help in it."""
    done = egrsd()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("Usage: egrsd ") == 1
    assert "error" not in done.stderr


def test_a_settings_file_that_cannot_be_written_is_refused_before_a_look_at_source_and_model(egrsd, tmp_path):
    file = str(tmp_path / "new" / "mine.yaml")
    done = egrsd("init", file, "--model", "tiny-reasoner", "--source", "tiny-arithmetic")
    assert done.returncode == 2
    assert f"error: {file}: cannot be written (there is no folder {tmp_path / 'new'})." in done.stderr
    assert "looking at" not in done.stdout


def test_what_a_mistake_quotes_cannot_drive_the_terminal(egrsd, empty_run):
    done = egrsd("stage", "la\x1b[31mbel[red]\u202e", "--run", empty_run.uri, "--round", "0")
    assert done.returncode == 2
    assert "\\x1b[31m" in done.stderr
    assert "[red]" in done.stderr
    assert "\x1b" not in done.stderr
    assert "\u202e" not in done.stderr


def test_debug_shows_the_traceback(egrsd):
    done = egrsd("recipes", "--show", "dem", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_no_run_is_told(egrsd, tmp_path):
    done = egrsd("status", "--run", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "no run here" in done.stderr


def test_a_recipe_is_printed_as_yaml_that_config_reads(egrsd):
    import yaml

    shown = egrsd("recipes", "--show", "smollm2").stdout
    assert yaml.safe_load(shown) == json.loads(json.dumps(recipes.smollm2().model_dump(mode="json")))
