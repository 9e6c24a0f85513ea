"""Another model behind the path that a run was made with is noticed: it is refused, or noted where it is accepted."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from actors.fakes import FakeEngine
from jobs import ask, audit, compare, distill, evaluate, export
from jobs.settle import Choices
from jobs.stage import Redo, run_stage
from pipeline.errors import ModelError, StoreError
from pipeline.inspection.proof import prove
from pipeline.models.resolve import asset_path
from pipeline.overrides import resolve
from pipeline.recipes import demo
from pipeline.rounds import contents
from pipeline.rounds.contents import KeptModel
from pipeline.store.directory import Store

STORED = Path(__file__).parents[1] / "stored_run" / "group.tar.xz"
A, B = "a" * 64, "b" * 64


@pytest.fixture
def base(tmp_path):
    return Path(shutil.copytree(asset_path(), tmp_path / "base"))


@pytest.fixture
def made(tmp_path, base):
    """(store, run) of a run with traces of student and teacher, whose models are kept."""
    teacher = shutil.copytree(base, tmp_path / "large")
    sets = [f"model.path={base}", f"teachers.large.model={teacher}", "teachers.large.engines={}"]
    run, store = resolve(demo(), sets), Store(str(tmp_path / "run"))
    contents.keep(store, run, contents.look(run))
    store.write("rounds/0000/plan.json", b"{}")
    return store, run


def edit(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_models_as_they_were_pass_and_nothing_is_written(made):
    store, run = made
    before = store.local_root.joinpath("models.json").stat().st_mtime_ns
    assert contents.refuse_changes(store, contents.look(run), accept=False) == []
    contents.keep(store, run, contents.look(run))
    assert store.local_root.joinpath("models.json").stat().st_mtime_ns == before
    assert contents.read_models(store).keys() == {"model.path", "teachers.large.model"}


@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja", "generation_config.json"])
def test_another_content_is_refused_with_the_file_until_it_is_accepted(made, base, name):
    store, run = made
    edit(base / name)
    now = contents.look(run)
    with pytest.raises(
        ModelError, match=rf"model\.path {base} has other files than the run was made with: {name}\..*--accept-changes"
    ) as raised:
        contents.refuse_changes(store, now, accept=False)
    assert "\n" not in str(raised.value)
    assert contents.refuse_changes(store, now, accept=True) == [
        f"note: model.path {base} has other files than the run was made with: {name}. What is finished stays as it is."
    ]
    contents.keep(store, run, now)
    assert contents.changes(store, now) == {}


def test_a_teacher_counts_too_and_a_file_that_went_or_came(made, base):
    store, run = made
    edit(base.with_name("large") / "model.safetensors")
    (base / "chat_template.jinja").unlink()
    (base / "merges.txt").write_text("")
    assert contents.changes(store, contents.look(run)) == {
        "model.path": f"model.path {base} has other files than the run was made with: chat_template.jinja, merges.txt",
        "teachers.large.model": f"teachers.large.model {base.with_name('large')} has other files than the run was made with: "
        "model.safetensors",
    }


def test_each_setting_accepts_its_own_model_alone(made, base):
    store, run = made
    edit(base.with_name("large") / "model.safetensors")
    assert contents.named_by("teachers.large.revision") == contents.named_by("teachers.large.model") == "teachers.large.model"
    assert (contents.named_by("model.revision"), contents.named_by("rollout.top_p")) == ("model.path", None)
    with pytest.raises(ModelError, match=r"^teachers\.large\.model|: teachers\.large\.model"):
        contents.refuse_changes(store, contents.look(run), {"model.path"})
    assert len(contents.refuse_changes(store, contents.look(run), {"teachers.large.model"})) == 1


def test_equal_content_under_another_path_passes(made, base, tmp_path):
    store, run = made
    other = resolve(run, [f"model.path={shutil.copytree(base, tmp_path / 'mnt')}"])
    assert contents.changes(store, contents.look(other)) == {}


def test_a_run_without_the_file_or_without_traces_is_trusted(made, base):
    store, run = made
    edit(base / "model.safetensors")
    store.delete("rounds")
    assert contents.changes(store, contents.look(run)) == {}
    store.write("evals/other-0123abcd/0000/plan.json", b"{}")
    assert len(contents.changes(store, contents.look(run))) == 1
    store.delete(contents.MODELS)
    assert contents.changes(store, contents.look(run)) == {}
    contents.keep(store, run, contents.look(run))
    assert store.read_bytes(contents.MODELS) is not None


def test_a_machine_without_the_model_or_without_its_weights_keeps_what_others_have_found(made, base):
    store, run = made
    before = contents.read_models(store)
    (base / "model.safetensors").unlink()
    assert contents.changes(store, contents.look(run)) == {}
    contents.keep(store, run, contents.look(run))
    assert contents.read_models(store) == before
    shutil.rmtree(base)
    contents.keep(store, run, contents.look(run))
    assert contents.read_models(store) == before
    other = resolve(run, ["model.path=tiny-reasoner"])
    contents.keep(store, other, {})
    assert contents.read_models(store).keys() == {"teachers.large.model"}  # what was kept is of another path


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"commit": "1" * 40}, {"commit": "1" * 40, "files": {"config.json": A}}, None),
        ({"commit": "1" * 40}, {"commit": "2" * 40}, "is at commit 222222222222 of the hub, and the run was made with 1111"),
        ({"commit": "1" * 40, "weights": {"x": A}}, {"commit": "2" * 40, "weights": {"x": A}}, None),  # a README changed
        ({"commit": "1" * 40, "weights": {"x": A}}, {"commit": "2" * 40, "weights": {"x": B}}, "with: x"),
        ({"commit": "1" * 40, "weights": {"x": A, "y": A}}, {"commit": "2" * 40, "weights": {"x": A}}, "is at commit"),
        ({"commit": "1" * 40, "weights": {"x": A}}, {"files": {"config.json": A}, "weights": {"x": A}}, None),  # now a folder
        ({"files": {"config.json": A}}, {"commit": "2" * 40, "files": {"config.json": B}}, "with: config.json"),
    ],
)
def test_a_hubs_model_is_compared_by_commit_and_by_the_files_that_both_have(tmp_path, old, new, said):
    store = Store(str(tmp_path))
    store.write("rounds/0000/plan.json", b"{}")
    contents.keep(store, demo(), {"model.path": KeptModel(path="tiny-reasoner", **old)})
    found = contents.changes(store, {"model.path": KeptModel(path="tiny-reasoner", **new)})
    assert bool(found) == (said is not None)
    assert all(said in text for text in found.values())


def test_files_of_one_commit_are_kept_from_all_machines(tmp_path):
    store = Store(str(tmp_path))
    for name in ("config.json", "tokenizer.json"):
        model = KeptModel(path="tiny-reasoner", commit="1" * 40, files={name: A})
        contents.keep(store, demo(), {"model.path": model})
    assert contents.read_models(store)["model.path"].files == {"config.json": A, "tokenizer.json": A}


def test_a_damaged_file_is_refused_with_its_field_and_found_by_verify(made):
    store, run = made
    store.write_json(contents.MODELS, {"model.path": {"path": "x", "weights": {"model.safetensors": "short"}}})
    with pytest.raises(StoreError, match=r"models\.json: model\.path\.weights\.model\.safetensors"):
        contents.changes(store, contents.look(run))
    assert any("models.json" in line for line in prove(store, run).findings)


@pytest.fixture
def begun(tmp_path):
    """A run with traces of another tiny reasoner than the shipped one, as its models.json says."""
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    store = Store(str(tmp_path / "group"))
    run = store.load_run()
    now = contents.look(run)["model.path"]
    contents.keep(store, run, {"model.path": now.model_copy(update={"weights": {"model.safetensors": A}})})
    return store


VERBS = {
    "distill": lambda store: distill.distill(store.uri, Choices(), engine_class=FakeEngine),
    "stage": lambda store: run_stage(store.uri, Redo("prompts", "0", force=True)),
    "evaluate": lambda store: evaluate.evaluate(store.uri, evaluate.Options("0", [], None, []), None, False, FakeEngine),
    "ask": lambda store: ask.ask(store.uri, ask.Question("1+1", "0", None), None, False, FakeEngine),
    "audit": lambda store: audit.audit_run(store.uri, 0, ("grpo", [], (6, 0, "adapter")), False),
    "export": lambda store: export.export_model(store.uri, export.ModelFolder(f"{store.uri}-model", "last", True), False),
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_verbs_that_ask_a_model_refuse_another_one(begun, capfd, verb):
    before = begun.read_bytes(contents.MODELS)
    for what in ("policy/0002", "evals"):  # so that there is something to do
        begun.delete(what)
    with pytest.raises(SystemExit) as ended:
        VERBS[verb](begun)
    assert ended.value.code == 2
    said = " ".join("".join(capfd.readouterr()).split())
    assert "model.path tiny-reasoner has other files than the run was made with: model.safetensors" in said
    assert "--accept-changes" in said
    assert begun.read_bytes(contents.MODELS) == before


def test_a_complete_run_says_it_and_takes_the_new_model_when_it_is_accepted(begun, capfd):
    for accept in (False, True):
        distill.distill(begun.uri, Choices(accept_changes=accept), engine_class=FakeEngine)
        assert "note: model.path tiny-reasoner has other files" in capfd.readouterr().out
    assert contents.changes(begun, contents.look(begun.load_run())) == {}


def test_a_stage_that_asks_no_model_works_on_and_accepts_nothing(begun):
    before = begun.read_bytes(contents.MODELS)
    run_stage(begun.uri, Redo("label", "0", force=True))
    assert begun.read_bytes(contents.MODELS) == before


def test_a_comparison_refuses_it_too_and_names_its_own_way_out(tmp_path, capfd):
    options = compare.Options("demo", "egrsd", "0", None, [], None)
    [(key, run)] = (compared := compare.chosen(Store(str(tmp_path)), options)).runs.items()
    now = contents.look(run)["model.path"]
    contents.keep(compared.folder(key), run, {"model.path": now.model_copy(update={"weights": {"model.safetensors": A}})})
    compared.folder(key).write("evals/other-0123abcd/summary.json", b"{}")
    with pytest.raises(SystemExit):
        compare.compare(str(tmp_path), options, None, False, FakeEngine)
    said = " ".join("".join(capfd.readouterr()).split())
    assert "model.path tiny-reasoner has other files than the run was made with: model.safetensors" in said
    assert "Put the old model back, or use another --out" in said


def test_what_an_old_model_made_of_unfinished_rounds_and_evaluations_is_deleted_and_nothing_else(begun):
    run, stages = begun.load_run(), ("prompts", "rollout", "grade", "score", "profile", "label")
    left = lambda where: [name for name in stages if begun.entries(where, name)]  # noqa: E731
    whole = {where: left(where) for where in ("rounds/0000", "rounds/0001", "evals/0000", "evals/0002")}
    assert contents.forget_unfinished(begun, run, {}, [1], [2]) == []
    assert {where: left(where) for where in whole} == whole
    assert contents.forget_unfinished(begun, run, {"teachers.large.model"}, [1], []) == ["rounds/0001"]
    assert left("rounds/0001") == ["rollout", "grade", "profile", "label"]  # no teacher writes traces
    assert contents.forget_unfinished(begun, run, {"model.path"}, [1], [2]) == ["rounds/0001", "evals/0002"]
    assert (left("rounds/0001"), left("evals/0002")) == (["grade", "profile", "label"], ["grade"])
    assert begun.ready(1) is None
    assert {where: left(where) for where in ("rounds/0000", "evals/0000")} == {w: whole[w] for w in ("rounds/0000", "evals/0000")}
