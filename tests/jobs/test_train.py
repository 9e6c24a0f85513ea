"""`egrsd train` on stored traces: policies that exist are named, kept until the new ones are whole, and put back on a failure."""

import pytest
from in_process import brought, planned

from jobs import train
from pipeline.errors import TrainingError
from pipeline.overrides import resolve
from pipeline.store import replaced
from pipeline.store.directory import Store
from pipeline.training import worker

SETS = ("rounds=1", "grade.advantage=running", "train.batch_traces=8", "train.warmup_steps=0", "evaluation.problems=0")


@pytest.fixture
def trained(tmp_path, monkeypatch, trained_here, capfd):
    """A run with one round that is trained, without Ray."""
    monkeypatch.setattr(train, "start", lambda *_: None)
    work = planned(tmp_path / "run", *SETS)
    work.store.save_run(work.run, {})
    brought(work)
    train.train_committed(work.store.uri, None, [], None, False)
    capfd.readouterr()
    return work.store


def content(store, folder="."):
    return {str(p.relative_to(store.local_root)): p.read_bytes() for p in (store.local_root / folder).rglob("*") if p.is_file()}


def test_a_policy_is_not_replaced_without_a_word(trained, capfd):
    before = content(trained)
    with pytest.raises(SystemExit) as ended:
        train.train_committed(trained.uri, 0, ["objective.name=rlsd"], None, False)
    assert ended.value.code == 2
    said = capfd.readouterr().out
    assert f"would replace policies 1 ({replaced.policy_hash(trained, 1)}) of this run. Train into a new run with --out" in said
    assert content(trained) == before


def test_replace_names_what_goes_and_deletes_it_at_the_end(trained, capfd, monkeypatch):
    old, was = replaced.policy_hash(trained, 1), content(trained, "policy/0001")
    fit, kept = worker.fit, {}

    def look(*arguments):
        kept.update(content(trained, "policy"))
        fit(*arguments)

    monkeypatch.setattr(worker, "fit", look)
    train.train_committed(trained.uri, 0, ["objective.name=rlsd"], None, False, train.Target(replace=True))
    said = capfd.readouterr().out
    assert f"replaces policies 1 ({old}). They stay in policy/*.replaced-*" in said
    assert "run.json: objective.name was 'cl_egrsd', now 'rlsd'." in said
    aside = f"policy/0001.replaced-{old}"
    assert kept == {name.replace("policy/0001", aside): data for name, data in was.items()}
    assert trained.names("policy") == trained.names("train") == ["0001"]
    assert replaced.policy_hash(trained, 1) != old


def test_a_trainer_that_fails_leaves_policies_state_and_settings_as_they_were(trained, capfd, monkeypatch):
    def fail(*_):
        raise TrainingError("the loss is not finite", "round 0")

    before = content(trained)
    monkeypatch.setattr(worker, "fit", fail)
    with pytest.raises(SystemExit):
        train.train_committed(trained.uri, 0, ["objective.name=rlsd"], None, False, train.Target(replace=True))
    assert "policies 1 to 1 and the settings are as they were before" in capfd.readouterr().out
    after = content(trained)
    assert {n: d for n, d in after.items() if n != "run.json"} == {n: d for n, d in before.items() if n != "run.json"}
    assert trained.load_run().objective.name == "cl_egrsd"


def test_out_trains_into_a_new_run_and_leaves_the_old_one_alone(trained, tmp_path, capfd):
    before, new = content(trained), Store(str(tmp_path / "new"))
    target = train.Target(out=new.uri)
    train.train_committed(trained.uri, 0, ["objective.name=rlsd"], None, False, target)
    assert content(trained) == before
    assert new.load_run() == resolve(trained.load_run(), ["objective.name=rlsd"])
    assert content(new, "rounds/0000/rollout") == content(trained, "rounds/0000/rollout")
    assert replaced.policy_hash(new, 1) != replaced.policy_hash(trained, 1)
    with pytest.raises(SystemExit):
        train.train_committed(trained.uri, 0, [], None, False, target)
    assert "a run is there already" in capfd.readouterr().out


def test_an_export_and_a_report_do_not_replace_files_unasked(trained, tmp_path, capfd):
    from jobs.export import export_run
    from jobs.report import report_run

    out, page = tmp_path / "out", tmp_path / "mine.html"
    export_run(trained.uri, str(out), False)
    (out / "round-0007.parquet").write_bytes(b"of another run")
    page.write_text("mine")
    for command in (lambda: export_run(trained.uri, str(out), False), lambda: report_run(trained.uri, None, str(page), False)):
        with pytest.raises(SystemExit) as ended:
            command()
        assert ended.value.code == 2
        assert "already" in capfd.readouterr().out
    assert page.read_text() == "mine"
    export_run(trained.uri, str(out), False, replace=True)
    assert [path.name for path in out.glob("*.parquet")] == ["round-0000.parquet"]
