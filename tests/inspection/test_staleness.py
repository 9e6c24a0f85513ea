"""What is stale is told once for each kind, with one command that mends it; a round that is being made is not stale."""

import shlex

import pytest
from in_process import brought, planned

from pipeline.inspection.staleness import among, look, ranges
from pipeline.overrides import resolve


@pytest.fixture
def run(tmp_path):
    work = planned(tmp_path / "a run")
    work.store.save_run(work.run, {})
    return work


def test_a_round_that_is_being_made_is_not_stale(run):
    brought(run, "prompts")
    first = next(iter(run.shards))
    run.store.delete(f"{run.area}/prompts/{first}.json")
    found = look(run.store, run.run)
    assert found.is_empty
    assert found.lines() == ["round 0 is being made: stage prompts"]


def test_one_sentence_for_a_kind_and_one_command_that_mends_all_stages(run):
    """A run of 16 rounds had sixteen lines of staleness, and no remedy."""
    brought(run)
    brought(planned(run.store.uri, number=1))
    changed = resolve(run.run, ["label.gamma=1", "profile.window=1"])
    found = look(run.store, changed)
    assert found.lines() == [
        "stale: profile of rounds 0 to 1, 4 of 4 shards (settings)",
        "stale: label of rounds 0 to 1, 4 of 4 shards (settings)",
        f"mend: `egrsd stage profile,label --run {shlex.quote(run.store.uri)} --round 0..1`",
    ]


def test_the_command_parses_to_the_run_its_rounds_and_stages(run):
    import typer.main

    from jobs.cli import app

    brought(run)
    [offered] = look(run.store, resolve(run.run, ["label.gamma=1"])).remedies()
    program, verb, *words = shlex.split(offered.strip("`"))
    given = typer.main.get_command(app).commands[verb].make_context(verb, words).params
    assert (program, given["run"], given["round"], given["stage"]) == ("egrsd", run.store.uri, "0", "label")


@pytest.mark.parametrize(
    ("numbers", "words", "option"),
    [([3], "round 3", "3"), ([0, 1, 2], "rounds 0 to 2", "0..2"), ([5, 0, 2, 3], "rounds 0, 2 to 3, 5", "0,2..3,5")],
)
def test_numbers_in_words_and_as_an_option(numbers, words, option):
    assert among(numbers, "round") == words
    assert ranges(numbers) == option
