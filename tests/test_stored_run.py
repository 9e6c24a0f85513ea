"""A run made by earlier code is read, resumed, labelled, trained, exported and reported, and nothing of it is stale.

tests/stored_run/ holds two runs of the demo recipe, made in November 2026 (code 31aa128) with `model.lora_rank=1`, four prompts a
round and two rounds: `group`, and `running` with `grade.advantage=running`, `profile.normaliser=batch_max`, `max_staleness=1` and
`rollout.teacher_share=0.5`. Logs, lease and the training state before the last are left out. Never make them anew: a change that
makes them stale makes every user's run stale. A new setting is marked LATER (pipeline/config/).
"""

import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from in_process import bring_up_to_date
from safetensors.torch import load_file

from jobs.cli import app
from pipeline.contract import COLUMNS
from pipeline.inspection.remaining import Remaining
from pipeline.overrides import resolve
from pipeline.problems.sources import open_source
from pipeline.report.collect import collect
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import evaluation_run, open_round, open_rounds, problems_digest
from pipeline.stages import EVALUATION, PLAIN, STAGES
from pipeline.store.directory import Store, area
from pipeline.training import rank

FOLDER = Path(__file__).parent / "stored_run"
RUNS = ("group", "running")
TRACES = {"group": 32, "running": 16}


@pytest.fixture(scope="module", params=RUNS)
def stored(request, tmp_path_factory):
    """A stored run, unpacked, and its settings."""
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(FOLDER / f"{request.param}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    store = Store(str(folder / request.param))
    return store, store.load_run()


@pytest.fixture
def spoilt(stored, tmp_path):
    """A copy of it, to be changed."""
    shutil.copytree(stored[0].local_root, tmp_path / stored[0].local_root.name)
    return Store(str(tmp_path / stored[0].local_root.name)), stored[1]


def works(store, run):
    """Every round and evaluation, with the stages it went through."""
    for work in open_rounds(store, run):
        yield work, PLAIN
    for number in store.numbers("evals"):
        yield open_round(store, evaluation_run(run), "evals", number), [STAGES[name] for name in EVALUATION]


def egrsd(capfd, *arguments):
    """What a verb says."""
    app([*arguments], standalone_mode=False)
    return " ".join(capfd.readouterr().out.split())


def test_no_digest_of_settings_has_changed(stored):
    checked = 0
    for work, stages in works(*stored):
        for stage in stages:
            for shard in work.shards:
                entry = work.store.entry(work.area, stage.name, shard)
                assert entry.settings == work.run.digest(stage.settings), f"{work.area} {stage.name}"
                checked += 1
    assert checked == 2 * 2 * len(PLAIN) + 2 * len(EVALUATION)


def test_nothing_is_stale_also_where_the_source_is_read_again(stored):
    for work, stages in works(*stored):
        source, seen = open_source(work.run.source), Inventory(work)
        for shard, indices in work.shards.items():
            digest = problems_digest(source.rows(indices))
            assert {stage.name: seen.why_stale(stage, shard, digest) for stage in stages} == dict.fromkeys(s.name for s in stages)


def test_a_resume_has_nothing_to_do_and_another_round_is_all_that_is_added(stored):
    store, run = stored
    remaining = Remaining.of(store, run)
    assert remaining.is_empty
    assert not remaining.stale
    more = Remaining.of(store, resolve(run, ["rounds=3"]))
    assert (more.train, more.label, more.evaluate, more.stale) == ([2], [], [3], [])


def test_a_changed_setting_makes_its_own_stages_stale(stored):
    store, run = stored
    remaining = Remaining.of(store, resolve(run, ["label.gamma=0.5"]))
    assert (remaining.train, remaining.label, remaining.evaluate) == ([], [0, 1], [])
    assert Remaining.of(store, resolve(run, ["rollout.top_p=0.5"])).stale


def test_the_report_says_which_labels_are_stale(stored):
    store, run = stored
    noted = lambda run: {of["note"] for of in collect(store, run)["sample"]["rounds"].values()}  # noqa: E731
    assert noted(run) == {None}
    [note] = noted(resolve(run, ["label.gamma=0.5"]))
    assert note.startswith("The labels of this round are stale (settings).")


def test_every_stage_without_engines_computes_the_same_bytes(spoilt):
    """Another pyarrow writes other bytes: then the values are compared."""
    same_writer = spoilt[0].read_json("run.json")["versions"]["pyarrow"] == pa.__version__
    kept = ("settings", "inputs", "facts", "rows", "rejected", *(("sha256", "data") if same_writer else ()))
    for work, stages in works(*spoilt):
        source = open_source(work.run.source)
        for stage in reversed([stage for stage in stages if stage.where == "CPU"]):  # each from the stored inputs
            for shard, indices in work.shards.items():
                old = work.store.entry(work.area, stage.name, shard)
                before, problems = work.store.read(old), None if stage.reads else source.rows(indices)
                new, computed = bring_up_to_date(work, stage, shard, problems, force=True)
                assert computed
                assert {f: getattr(new, f) for f in kept} == {f: getattr(old, f) for f in kept}, f"{work.area} {stage.name}"
                assert work.store.read(new).equals(before)


def test_the_running_rewards_are_folded_as_they_were(stored):
    store, run = stored
    kept = store.read_json("rounds/0000/baseline.json", "grade", "before", "after")
    assert (kept is None) == (run.grade.advantage == "group")
    if kept is not None:
        assert open_round(store, run, "rounds", 1).baseline.to_dict() == kept["after"]


def test_training_goes_on_from_the_last_state(stored):
    store, run = stored
    trainer = rank.resume(store, run, torch.device("cpu"))
    cursor = store.read_json("train/0002/cursor.json")
    assert (trainer.step, cursor["round"]) == (cursor["step"], 2)
    assert trainer.step > 0
    moments = load_file(store.local_root / "train/0002/optimizer.safetensors")
    for name, parameter in trainer.parameters().items():
        for key, value in trainer.optimizer.state[parameter].items():
            assert torch.equal(torch.as_tensor(value), moments[f"{name}.{key}"]), f"{name}.{key}"


def test_training_on_the_stored_rounds_makes_the_stored_policies(stored, spoilt):
    store, run = spoilt
    store.delete("policy")
    store.delete("train")
    trainer = rank.resume(store, run, torch.device("cpu"))
    for number in range(run.rounds):
        assert rank.train_round(trainer, store, number)
        made, kept = (
            load_file(s.local_root / area("policy", number + 1) / "adapter_model.safetensors") for s in (store, stored[0])
        )
        assert made.keys() == kept.keys()
        for name in kept:
            torch.testing.assert_close(made[name], kept[name], rtol=0, atol=1e-6)


def test_the_verbs_read_it(spoilt, tmp_path, capfd):
    store, _ = spoilt
    name = store.local_root.name
    said = egrsd(capfd, "status", "--run", store.uri)
    assert "demo: 2 of 2 rounds" in said
    assert "stale:" not in said
    assert "policies: 0 to 2. Evaluated: policy 0, policy 2." in said
    assert "Nothing to do: all 2 rounds" in egrsd(capfd, "distill", "--run", store.uri)
    assert f"{TRACES[name]} traces of 2 rounds" in egrsd(capfd, "export", "--run", store.uri, "--out", str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out")
    assert table.num_rows == TRACES[name]
    mine = {
        column.name for column in COLUMNS.values() if not column.optional and column.writer != "reward"
    }  # a column that is younger is not there
    assert set(table.column_names) == {"round", "reject_reason", "reject_detail", *mine}
    said = egrsd(capfd, "report", "--run", store.uri)
    assert f"2 rounds, {TRACES[name]} of {TRACES[name]} labelled traces" in said
    assert "does not add up" not in said
