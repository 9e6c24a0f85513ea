"""`egrsd train` on stored traces: policies that exist are named, kept until the new ones are whole, and put back on a failure."""

import shutil
import threading

import pytest
from in_process import brought, planned
from waiting import until

from actors.fakes import UNWATCHED
from jobs import train
from jobs.opened import hold_run
from jobs.screen.terminal import session
from pipeline import driver
from pipeline.errors import TrainingError, UserError
from pipeline.inspection.staleness import look
from pipeline.live import lease
from pipeline.overrides import resolve
from pipeline.rounds import contents
from pipeline.store import replaced
from pipeline.store.directory import Store
from pipeline.training import worker
from pipeline.training.agreement import base_model

SETS = (
    *UNWATCHED,
    "rounds=1",
    "grade.advantage=running",
    "train.batch_traces=8",
    "train.warmup_steps=0",
    "evaluation.problems=0",
)


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
    said = "".join(capfd.readouterr())
    assert f"would replace policies 1 ({replaced.policy_hash(trained, 1)}) of this run. Train into a new run with --out" in said
    assert content(trained) == before


def test_the_random_adapter_that_no_engine_asks_for_goes(trained, tmp_path):
    trained.write(f"{base_model.ADAPTER}/manifest.json", b"{}")
    train.train_committed(trained.uri, 0, [], None, False, train.Target(replace=True))
    assert "probe" not in trained.names("train")


def test_replace_names_what_goes_and_deletes_it_at_the_end(trained, capfd, monkeypatch):
    old, was = replaced.policy_hash(trained, 1), content(trained, "policy/0001")
    ready, metrics = (trained.read_bytes(path) for path in ("rounds/0000/ready.json", "metrics/0000-train.jsonl"))
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
    assert kept == {name.replace("policy/0001", aside): data for name, data in was.items()} | {
        f"{aside}/ready.json": ready,
        f"{aside}/train.jsonl": metrics,
    }
    assert trained.names("policy") == trained.names("train") == ["0001"]
    assert replaced.policy_hash(trained, 1) != old


def test_a_trainer_that_fails_leaves_policies_state_and_settings_as_they_were(trained, capfd, monkeypatch):
    """Its ready.json told the shards of now, so the old policy counted as trained on them."""

    def fail(store, _):
        store.append_metrics([{"round": 0, "loss": 1.0}])  # the trainer's last file before a policy
        raise TrainingError("the loss is not finite", "round 0")

    regraded = planned(trained.local_root, *SETS, "grade.answer_pattern=([0-9])", "grade.verifier=exact")
    brought(regraded, "grade")
    trained.save_run(regraded.run, {})
    assert look(trained, regraded.run).policies == [1]
    before = content(trained)
    monkeypatch.setattr(worker, "fit", fail)
    with pytest.raises(SystemExit):
        train.train_committed(trained.uri, 0, ["objective.name=rlsd"], None, False, train.Target(replace=True))
    assert "policies 1 to 1 and the settings are as they were before" in "".join(capfd.readouterr())
    after = content(trained)
    assert {n: d for n, d in after.items() if n != "run.json"} == {n: d for n, d in before.items() if n != "run.json"}
    assert trained.load_run().objective.name == "cl_egrsd"
    assert look(trained, trained.load_run()).policies == [1]


def test_a_replacement_in_a_run_that_another_command_has_taken_is_left_to_it(trained, capfd, monkeypatch):
    """This process had stood still. It put old policies back under the feet of the other, and deleted its copies."""

    def taken(store, _):
        store.write_json(lease.LEASE, {"token": "y", "holder": "process 2 on far", "host": "far", "pid": 2, "beats": 0})
        raise TrainingError("the cluster is lost", "round 0")

    monkeypatch.setattr(worker, "fit", taken)
    with pytest.raises(SystemExit):
        train.train_committed(trained.uri, 0, ["objective.name=rlsd"], None, False, train.Target(replace=True))
    assert "as they were before" not in "".join(capfd.readouterr())
    assert [name.partition("-")[0] for name in trained.names("policy")] == ["0001.replaced"]
    assert trained.load_run().objective.name == "rlsd"


def test_old_policies_are_not_put_back_while_the_trainer_still_writes(trained, capfd, monkeypatch):
    """Both wrote into one folder, which was a damaged policy 1. The copies of the old one were deleted."""
    may_end, before = threading.Event(), content(trained, "policy")

    def writes(*_):
        trained.write("policy/0001/half", b"x")
        may_end.wait(60)

    def interrupted(_):
        until(lambda: trained.names("policy/0001") == ["half"])
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "END_S", 0.1)
    monkeypatch.setattr(worker, "fit", writes)
    monkeypatch.setattr(worker.Handle, "join", interrupted)
    with pytest.raises(SystemExit) as ended:
        train.train_committed(trained.uri, 0, ["objective.name=rlsd"], None, False, train.Target(replace=True))
    assert ended.value.code == 130
    assert "the trainer has not ended yet: the next command tidies up" in "".join(capfd.readouterr())
    assert trained.names("policy/0001") == ["half"]
    may_end.set()
    with session(False) as out:
        assert hold_run(out, trained.uri).run.objective.name == "cl_egrsd"
    assert content(trained, "policy") == before


class Killed(BaseException):
    """Stands for SIGKILL: nothing is tidied up after it."""


def test_a_replacement_that_is_killed_anywhere_is_undone_by_the_next_command(trained, tmp_path, monkeypatch):
    def all_of(store):
        return {
            name: data for folder in ("policy", "train", "rounds", "metrics") for name, data in content(store, folder).items()
        }

    old, before, left = trained.load_run(), all_of(trained), [0]

    def counted(real):
        def act(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*arguments)

        return act

    for write in range(0, 60, 2):
        store = Store(str(shutil.copytree(trained.local_root, tmp_path / f"copy{write}")))
        left[0], killed = write, False
        with monkeypatch.context() as patched:
            for name in ("write", "delete"):
                patched.setattr(Store, name, counted(getattr(Store, name)))
            try:
                replaced.set_aside(store, 0)
                store.save_run(resolve(old, ["objective.name=rlsd"]), {})
                store.write("rounds/0000/ready.json", b"the shards of now")
                store.append_metrics([{"round": 0, "loss": 1.0}])
                replaced.settle(store)
            except Killed:
                killed = True
        with session(False) as out:
            assert hold_run(out, store.uri).run == old
        assert all_of(store) == before
        assert not (store.local_root / "run.replaced.json").exists()
        if not killed:
            break
    assert not killed
    assert write > 10


def test_after_a_new_policy_a_killed_replacement_is_gone_on_with(trained, tmp_path):
    def policy(version, weights):
        (tmp_path / "new").mkdir(exist_ok=True)
        (tmp_path / "new" / "adapter_model.safetensors").write_bytes(weights)
        trained.publish_policy(version, tmp_path / "new")

    policy(2, b"old")
    replaced.set_aside(trained, 0)
    policy(1, b"new")
    assert "replaced only up to 1" in replaced.settle(trained)
    assert [name[:4] for name in trained.names("policy")] == ["0001", "0001", "0002"]
    with session(False) as out, pytest.raises(UserError, match=r"replaced only up to 1.*Run `egrsd train --run .*` to its end"):
        hold_run(out, trained.uri)  # `distill` would have written the traces of round 1 again, and deleted both old ones
    with session(False) as out:
        hold_run(out, trained.uri, replaces=True)
    with pytest.raises(UserError, match="its policies and settings are not those of before"):  # `--out` holds no lease
        train.train_committed(trained.uri, 0, [], None, True, train.Target(out=str(tmp_path / "out")))
    policy(2, b"new")
    assert replaced.settle(trained) == "policies 1 to 2 are replaced: the old ones are deleted."
    assert trained.names("policy") == ["0001", "0002"]
    assert replaced.settle(trained) is None


def test_settings_are_not_changed_when_the_policies_cannot_be_set_aside(trained, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    before = content(trained, "policy")
    monkeypatch.setattr(replaced, "_copy", fail)
    with pytest.raises(SystemExit):
        train.train_committed(trained.uri, 0, ["objective.name=rlsd"], None, False, train.Target(replace=True))
    assert trained.load_run().objective.name == "cl_egrsd"
    assert content(trained, "policy") == before


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
    assert "a run is there already" in "".join(capfd.readouterr())


def test_out_neither_writes_to_the_old_run_nor_waits_for_its_lease(trained, tmp_path, monkeypatch):
    """It may be a colleague's run that may only be read, and at work."""
    far = {"token": "x", "holder": "process 1 on far", "host": "far", "pid": 1, "beats": 7}
    trained.write_json(lease.LEASE, far)
    before = content(trained)
    for name in ("write", "delete", "sweep"):
        real = getattr(Store, name)

        def guarded(store, *arguments, real=real):
            assert store.uri != trained.uri, arguments
            return real(store, *arguments)

        monkeypatch.setattr(Store, name, guarded)
    train.train_committed(trained.uri, 0, [], None, False, train.Target(out=str(tmp_path / "new")))
    assert content(trained) == before
    assert Store(str(tmp_path / "new")).latest_policy() == 1


def test_a_run_that_changes_while_it_is_copied_is_not_trained_on(trained, tmp_path, capfd, monkeypatch):
    copy = replaced.copy_until

    def meanwhile(store, target, first):
        copy(store, target, first)
        entry = store.read_json("rounds/0000/grade/0000.json")
        store.write_json("rounds/0000/grade/0000.json", entry | {"seconds": 99.0})

    monkeypatch.setattr(replaced, "copy_until", meanwhile)
    new = Store(str(tmp_path / "new"))
    with pytest.raises(SystemExit):
        train.train_committed(trained.uri, 0, [], None, False, train.Target(out=new.uri))
    assert "rounds/0000/grade/0000.json: has changed while it was copied" in " ".join("".join(capfd.readouterr()).split())
    assert not new.exists()
    monkeypatch.undo()


def test_an_export_and_a_report_do_not_replace_files_unasked(trained, tmp_path, capfd):
    from jobs.export import export_run
    from jobs.report import report_run

    out, page = tmp_path / "out", tmp_path / "mine.html"
    export_run(trained.uri, str(out), False)
    (out / "round-0007.parquet").write_bytes(b"of another run")
    page.write_text("mine")
    for command in (lambda: export_run(trained.uri, str(out), False), lambda: report_run([trained.uri], None, str(page), False)):
        with pytest.raises(SystemExit) as ended:
            command()
        assert ended.value.code == 2
        assert "already" in "".join(capfd.readouterr())
    assert page.read_text() == "mine"
    report_run([trained.uri], None, str(page), False, replace=True)
    assert b"<html" in page.read_bytes()
    export_run(trained.uri, str(out), False, replace=True)
    assert [path.name for path in out.iterdir()] == ["round-0000.parquet"]
    assert {path.name for path in tmp_path.iterdir()} - {"run"} == {"out", "mine.html"}  # and no folder for unfinished files


def test_the_tests_before_left_the_real_trainer():
    """Another test of this process that asks for Ray Train would train in a thread, and show nothing."""
    assert worker.fit.__module__ == "pipeline.training.worker"


def test_another_model_behind_the_path_is_refused_before_anything_is_touched(trained, tmp_path, capfd):
    now = contents.look(trained.load_run())["model.path"]
    assert contents.read_models(trained) == {"model.path": now}  # the first training has kept it
    contents.keep(
        trained, trained.load_run(), {"model.path": now.model_copy(update={"weights": {"model.safetensors": "0" * 64}})}
    )
    before = content(trained)
    for target in (train.Target(replace=True), train.Target(out=str(tmp_path / "new"))):
        with pytest.raises(SystemExit) as ended:
            train.train_committed(trained.uri, 0, [], None, False, target)
        assert ended.value.code == 2
        said = " ".join("".join(capfd.readouterr()).split())
        assert "model.path tiny-reasoner has other files than the run was made with: model.safetensors" in said
        assert (f"egrsd distill --run {trained.uri} --accept-changes" in said) == target.replace  # else it may be another's
    assert content(trained) == before
    assert not (tmp_path / "new").exists()
