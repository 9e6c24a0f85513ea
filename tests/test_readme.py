"""What README says of stages, settings, recipes and files is what the code says."""

import re
from pathlib import Path

from jobs.cli import app
from pipeline import recipes
from pipeline.stages import stage_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHOWN = (
    "objective.name",
    "objective.gamma",
    "objective.window",
    "rounds",
    "max_staleness",
    "rollout.prompts_per_round",
    "rollout.group_size",
    "rollout.temperature",
    "rollout.max_new_tokens",
    "rollout.teacher_share",
    "grade.verifier",
    "grade.advantage",
    "model.lora_rank",
    "train.strategy",
    "train.workers",
    "train.batch_traces",
    "train.learning_rate",
    "engines.rollout.min",
    "engines.rollout.max",
    "engines.rollout.threads",
    "engines.rollout.max_num_seqs",
)


def setting(run, name):
    for part in name.split("."):
        run = getattr(run, part)
    return run


def settings_table():
    """README's table of settings, from the recipes."""
    rows = [f"| `{n}` | {setting(recipes.demo(), n)} | {setting(recipes.qwen3_8b(), n)} |" for n in SHOWN]
    return "\n".join(["| setting | demo | qwen3_8b |", "| --- | --- | --- |", *rows])


def test_the_stage_table_is_the_contracts():
    assert stage_table() in README


def test_the_settings_table_is_the_recipes():
    assert settings_table() in README


def test_the_setup_commands_exist_and_are_two():
    block = re.search(r"## Set up[\s\S]*?\n\n((?:    [^\n]*\n)+)", README)[1]
    commands = [line.split("#")[0].strip() for line in block.splitlines()]
    assert commands == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{command.split()[1]}:" in makefile for command in commands)


def test_every_file_readme_names_is_there():
    named = set(re.findall(r"`((?:tests|pipeline|actors|jobs)/[\w/]+\.?\w*/?)`", README))
    assert named
    for name in named:
        assert (ROOT / name).exists(), name
    tree = re.search(r"## The tree\n\n((?:    .*\n)+)", README)[1]
    for name in re.findall(r"(\w+\.py)", tree):
        assert list(ROOT.glob(f"**/{name}")), name


def test_every_verb_readme_shows_is_one():
    verbs = set(re.findall(r"`egrsd (\w+)", README))
    verbs |= set(re.findall(r"    egrsd (\w+)", README))
    assert verbs == {command.name or command.callback.__name__ for command in app.registered_commands}


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_the_table_of_metrics_is_the_one_that_runs_write():
    from pipeline.rounds.metrics import metric_table

    assert metric_table().strip() in README
