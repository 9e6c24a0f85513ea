"""Settings of a run that has begun: a change is refused with both values, and told where it is accepted."""

import json
import tarfile
from pathlib import Path

import pytest

from jobs import compare, doctor, evaluate
from jobs.screen import terminal
from jobs.settle import Choices, settle
from pipeline.config import Run
from pipeline.driver import Sources, cautions
from pipeline.errors import SettingError
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.problems.survey import COSTS
from pipeline.recipes import demo
from pipeline.store.directory import Store

STORED = Path(__file__).parents[1] / "stored_run" / "group.tar.xz"


def by_evaluate(store, file):
    with terminal.session(False) as out:
        return evaluate.begun(store.uri, evaluate.Options("0", [], None, [], None, file), out)[1]


@pytest.mark.parametrize(
    "verb",
    [
        lambda store, file: settle(store, Choices(config=file)),
        lambda store, file: doctor.chosen(Choices(config=file), store).run,
        lambda store, file: compare.chosen(store, compare.Options(None, "grpo", "0", None, [], file)).base,
        by_evaluate,
    ],
    ids=["distill", "doctor", "compare", "evaluate"],
)
def test_a_file_alone_means_the_same_settings_to_every_verb(verb, tmp_path, monkeypatch):
    """`compare` laid it over the demo, whose pattern of answers called every answer unparsable, and `evaluate` asked for that."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("rounds: 3\n")
    found = verb(Store(str(tmp_path / "run")), "~/mine.yaml")
    assert found == resolve(Run(name="mine"), ["rounds=3"])
    assert found.grade.answer_pattern != demo().grade.answer_pattern


def test_a_line_that_left_the_file_is_gone_when_the_start_before_made_nothing(tmp_path):
    """The file was laid over the run.json of that start: the line stood nowhere any more, and the run was made with it."""
    file, store, said = tmp_path / "mine.yaml", Store(str(tmp_path / "run")), []
    file.write_text("rollout: {top_k: 20}\n")
    choices = Choices(config=str(file))
    store.save_run(settle(store, choices, said.append), {})
    assert settle(store, choices, said.append).rollout.top_k == 20
    assert said == []
    file.write_text("rounds: 3\n")
    run = settle(store, choices, said.append)
    assert (run.rollout.top_k, run.rounds) == (Run(name="mine").rollout.top_k, 3)
    assert said == [
        f"note: settings have changed since a start that made nothing: rollout.top_k was 20, now {run.rollout.top_k}, "
        f"rounds was {Run(name='mine').rounds}, now 3."
    ]
    assert settle(store, Choices(sets=["seed=4"])).rollout.top_k == 20  # without a file run.json is all there is


def test_a_file_does_not_drop_the_recipe_of_a_run_that_has_made_nothing(tmp_path):
    file, store = tmp_path / "mine.yaml", Store(str(tmp_path / "run"))
    file.write_text("rounds: 3\n")
    store.save_run(settle(store, Choices("demo", config=str(file))), {})
    with pytest.raises(SettingError, match=r"started from recipe 'demo'\. Add --recipe demo, or use another --run"):
        settle(store, Choices(config=str(file)))
    assert settle(store, Choices("demo", config=str(file))).rounds == 3


def test_the_doctor_takes_settings_as_distill_does_and_offers_all_of_them(tmp_path):
    """`doctor --recipe demo --config F --set S` offered `distill --config F`: a run over the defaults, without S."""
    file, store = tmp_path / "my own.yaml", Store(str(tmp_path / "run"))
    file.write_text("rounds: 3\n")
    choices = Choices("demo", ["model.max_model_len=4096", "seed=4"], str(file))
    found = doctor.chosen(choices, None)
    assert found.run == settle(store, choices)
    sets = "--set model.max_model_len=4096 --set seed=4"
    assert doctor.offered(choices, found, None) == f"`egrsd distill --recipe demo --config '{file}' {sets} --run runs/demo`"
    store.save_run(found.run, {})
    less = Choices("demo", config=str(file))
    assert doctor.chosen(less, store).run == settle(store, less)


def test_the_doctor_offers_accept_changes_where_distill_would_ask_for_it(tmp_path):
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    store, choices = Store(str(tmp_path / "group")), Choices(sets=["rollout.temperature=0.5"])
    found = doctor.chosen(choices, store)
    assert found.begun
    assert [name for name, *_ in found.changed()] == ["rollout.temperature"]
    command = f"`egrsd distill --set rollout.temperature=0.5 --accept-changes --run {store.uri}`"
    assert doctor.offered(choices, found, store.uri) == command


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
    assert said == [f"accepted: rollout.temperature was {old!r}, now 0.5. It makes stale: rollout and what follows."]
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
