"""`egrsd evaluate` with the fake engine: only what is missing is asked, every figure has its interval and what decided it."""

import json
import re

import pytest
from transformers import AutoConfig

from actors.fakes import FakeEngine
from jobs import evaluate, status
from jobs.screen import envelope, terminal
from pipeline import recipes
from pipeline.contract import Failure
from pipeline.errors import UserError
from pipeline.evidence.documents import asked
from pipeline.models.warmstart import build_tokenizer
from pipeline.store.directory import Store
from pipeline.store.folders import NEEDED

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run that has published a policy beside the base; the fake engine looks at its version alone."""
    folder = tmp_path_factory.mktemp("evaluated")
    store = Store(str(folder / "run"))
    store.save_run(recipes.demo(), {})
    (folder / "adapter").mkdir()
    for name in NEEDED["policy"]:
        (folder / "adapter" / name).write_text("{}")
    store.publish_policy(3, folder / "adapter")
    return store


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Forty rows without a solution, of which one has no answer."""
    rows = [{"problem": f"{i}+1+1+1", "answer": str(i + 3)} for i in range(10, 49)]
    return write(tmp_path_factory.mktemp("problems") / "sums.jsonl", [*rows, {"problem": "1", "answer": None}])


def run_it(store, *sources, policies="0,last", k=2, sets=()):
    options = evaluate.Options(policies, list(sources), k, list(sets))
    evaluate.evaluate(store.uri, options, None, False, FakeEngine)


def shards(store, kind):
    return {path: path.stat().st_mtime_ns for path in (store.local_root / kind).rglob("*.parquet")}


def test_figures_settings_and_every_row_are_there(run_dir, ray_local, problems, capfd):
    run_it(run_dir, problems)
    said = " ".join(capfd.readouterr().out.split())
    assert "avg@2, %" in said
    assert "missing_answer" in said
    [kind] = [name for name in run_dir.names("evals") if name.startswith("sums-")]
    summary = run_dir.read_json(f"evals/{kind}/summary.json")
    assert (summary["problems"], summary["samples"], summary["k"]) == (40, 2, 2)
    assert summary["policies"].keys() == {"0", "3"}
    assert [(d["policy"], d["against"]) for d in summary["differences"]] == [(3, 0)]
    for policy in summary["policies"].values():
        assert sum(policy["verdicts"].values()) + sum(policy["rejected"].values()) == 80
        assert policy["rejected"] == {"missing_answer": 2}
        assert policy["figures"]["length"]["low"] <= policy["figures"]["length"]["high"]
    wanted = {"temperature", "top_p", "top_k", "max_new_tokens", "seed", "engine", "dtype", "template_hash", "verifier"}
    assert wanted <= summary["settings"].keys()
    assert summary["settings"]["engine"] == "fake"
    json.loads(json.dumps(summary, allow_nan=False))


def test_again_nothing_is_asked_and_after_a_kill_only_what_is_missing(run_dir, ray_local, problems, monkeypatch, capfd):
    run_it(run_dir, problems)
    [kind] = {path.parts[-4] for path in shards(run_dir, "evals") if path.parts[-4].startswith("sums-")}
    before = shards(run_dir, f"evals/{kind}")
    run_dir.delete(f"evals/{kind}/0003/rollout/0001.json")
    run_dir.delete(f"evals/{kind}/0003/grade/0001.json")
    run_it(run_dir, problems)
    after = shards(run_dir, f"evals/{kind}")
    changed = {(path.parts[-3], path.parts[-2], path.name[:4]) for path in after if before.get(path) != after[path]}
    assert changed == {("0003", "rollout", "0001"), ("0003", "grade", "0001")}
    monkeypatch.setattr(evaluate, "answer", lambda *_: pytest.fail("asked again"))
    capfd.readouterr()
    run_it(run_dir, problems)
    assert "avg@2" in capfd.readouterr().out


def test_a_later_command_keeps_what_earlier_ones_found_of_other_policies(run_dir, ray_local, problems):
    """Asking policy 3 alone took the base and all differences from page and model card."""
    run_it(run_dir, problems)
    run_it(run_dir, problems, policies="3")
    [kind] = [name for name in run_dir.names("evals") if name.startswith("sums-")]
    summary = run_dir.read_json(f"evals/{kind}/summary.json")
    assert summary["policies"].keys() == {"0", "3"}
    assert [(d["policy"], d["against"]) for d in summary["differences"]] == [(3, 0)]
    assert len(asked(run_dir, 0)) == len(asked(run_dir, 3)) >= 1


def test_sources_have_rows_of_their_own_and_a_macro_mean(run_dir, ray_local, problems, tmp_path, capfd):
    rows = [{"question": f"{i}+1", "answer": f"so it is\n#### {i + 1}"} for i in range(4)]
    run_it(run_dir, problems, f"gsm8k={write(tmp_path / 'copy.jsonl', rows)}", "tiny-arithmetic", sets=["evaluation.problems=6"])
    said = capfd.readouterr().out
    for title in ("sums: 6 problems", "gsm8k: 4 problems", "tiny-arithmetic: 6 problems", "macro mean over 3 sources"):
        assert title in said
    token = envelope.asked.set(envelope.Asked("evaluate", json=True))
    try:
        run_it(run_dir, problems, "tiny-arithmetic", sets=["evaluation.problems=6"])
    finally:
        envelope.asked.reset(token)
    result = json.loads(capfd.readouterr().out)["result"]
    assert [name.partition("-")[0] for name in result] == ["evals/sums", "evals/tiny", "macro_mean"]
    assert (result["macro_mean"]["sources"], list(result["macro_mean"]["policies"])) == (2, ["0", "3"])
    status.show(run_dir.uri, False)
    assert re.search(r"evals/gsm8k-\w+: policies 0", capfd.readouterr().out)


def test_figures_of_a_run_that_may_only_be_read_are_shown(run_dir, ray_local, problems, monkeypatch, capfd):
    """summary.json was written before the table: a finished evaluation of somebody else's run ended without a figure."""
    run_it(run_dir, problems)

    def refuse(store, path, data):
        raise UserError("cannot write (Permission denied)", store.locate(path))

    monkeypatch.setattr(Store, "write", refuse)
    capfd.readouterr()
    run_it(run_dir, problems)
    assert "avg@2, %" in capfd.readouterr().out
    run_it(run_dir, problems, policies="0")  # the file keeps the other policy
    assert "avg@2, %" in capfd.readouterr().out


def test_a_source_of_which_nothing_can_be_asked_is_refused_before_engines_start(run_dir, tmp_path, monkeypatch, capfd):
    """300 prompts: more than are made at one time."""
    monkeypatch.setattr(evaluate, "start", lambda *_, **__: pytest.fail("the cluster is joined"))
    long = write(tmp_path / "long.jsonl", [{"problem": "1+" * 100 + str(i), "answer": "1"} for i in range(300)])
    with pytest.raises(SystemExit) as ended:
        run_it(run_dir, long)
    assert ended.value.code == 2
    said = "".join(capfd.readouterr())
    assert f"error: {long}: all 300 prompts of the evaluation are rejected, 300 as prompt_too_long: " in said
    assert "Raise model.max_model_len (or that of the teacher whose prompt it is), or lower max_new_tokens" in said
    assert not [name for name in run_dir.names("evals") if name.startswith("long-")]


def test_one_problem_that_can_be_asked_is_enough(run_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(evaluate, "start", lambda *_, **__: (_ for _ in ()).throw(UserError("here it would start")))
    rows = [{"problem": "1+" * 100 + str(i), "answer": "1"} for i in range(300)]
    with pytest.raises(SystemExit):
        run_it(run_dir, write(tmp_path / "mixed.jsonl", [*rows, {"problem": "1+1", "answer": "2"}]))
    assert "error: here it would start" in "".join(capfd.readouterr())


def test_an_evaluation_of_rejected_rows_ends_with_the_commonest_reason(run_dir, ray_local, tmp_path, capfd):
    class Failing(FakeEngine):
        """A fake engine that answers no request."""

        def generate(self, requests, policy, sampling):
            return [Failure("it is out of tune") for _ in requests]

    sums = write(tmp_path / "tune.jsonl", [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(3)])
    with pytest.raises(SystemExit) as ended:
        evaluate.evaluate(run_dir.uri, evaluate.Options("0", [sums], 1, []), None, False, Failing)
    assert ended.value.code == 2
    assert "all 3 rows were rejected, 3 as engine_error: it is out of tune" in "".join(capfd.readouterr())


def test_status_still_reads_the_run_also_while_another_evaluation_works_or_was_killed(run_dir, capfd):
    run_dir.write_json("evals/lease.json", {"token": "x", "holder": "process 1", "host": "elsewhere", "pid": 1, "beats": 0})
    (run_dir.local_root / "evals" / ".tmp").mkdir(exist_ok=True)
    status.show(run_dir.uri, True)
    run_dir.delete("evals/lease.json")
    assert "evals/sums-" in capfd.readouterr().out


def test_status_of_a_finished_evaluation(run_dir, capfd):
    status.show(run_dir.uri, False)
    assert "policies: 0 to 3" in capfd.readouterr().out


def test_a_recipe_makes_a_run_whose_base_can_be_measured_before_any_round(tmp_path, capfd):
    """The same command goes on with it; other settings are refused, such as those of the file without the recipe."""
    file, uri = tmp_path / "my.yaml", str(tmp_path / "run")
    file.write_text("rollout: {group_size: 4}\n")

    def begun(recipe, config=None):
        with terminal.session(False) as out:
            return evaluate.begun(uri, evaluate.Options("0", [], 2, [], recipe, config), out)

    for _ in range(2):
        store, run = begun("demo", str(file))
        assert (store.load_run(), run.rollout.group_size) == (run, 4)
    assert begun(None)[1] == run
    for recipe, config, message in (
        ("demo", None, "rollout.group_size was 4, now 8"),
        (None, str(file), "this run was made with other settings"),
    ):
        with pytest.raises(SystemExit):
            begun(recipe, config)
        assert message in " ".join("".join(capfd.readouterr()).split())


def test_the_model_of_a_new_run_is_checked_before_its_base_is_measured(tmp_path, capfd):
    """A model without the default names of layers began with them, was measured, and its training was then refused."""
    model, file = tmp_path / "model", tmp_path / "my.yaml"
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "architectures": ["Phi3ForCausalLM"],
    }
    AutoConfig.for_model("phi3", **sizes, intermediate_size=96, num_key_value_heads=1).save_pretrained(model)
    build_tokenizer().save_pretrained(model)
    file.write_text(f"model: {{path: {model}, max_model_len: 128}}\n")

    def begun(uri):
        with terminal.session(False) as out:
            return evaluate.begun(str(tmp_path / uri), evaluate.Options("0", [], 2, [], "demo", str(file)), out)

    assert begun("run")[1].model.lora_targets == ("o_proj", "qkv_proj", "gate_up_proj", "down_proj")
    file.write_text(f"model: {{path: {model}, max_model_len: 300}}\n")
    with pytest.raises(SystemExit):
        begun("other")
    assert "the model's window is 256 tokens" in capfd.readouterr().err
