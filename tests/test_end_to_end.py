"""One run through real vLLM, Ray Data and Ray Train: the path of a row, resume, relabelling, agreement with transformers."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from committed import round_table
from safetensors.torch import load_file
from waiting import until

from actors.fakes import FakeEngine
from jobs import distill, export, stage, status, train
from jobs.settle import Choices
from pipeline import contract
from pipeline.evidence.evaluation import held_out
from pipeline.models.resolve import asset_path
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import open_round
from pipeline.rounds.rows import joined_round
from pipeline.stages import PLAIN
from pipeline.store.directory import Store, area
from pipeline.store.folders import ADAPTER
from pipeline.training.step import Trainer

ROUNDS, PROMPTS, GROUP = 2, 8, 8
SETS = [
    f"rounds={ROUNDS}",
    f"rollout.prompts_per_round={PROMPTS}",
    "rollout.prompts_per_shard=4",
    f"rollout.group_size={GROUP}",
    "rollout.teacher_share=0.125",
    "score.rescore_share=0.5",
    "train.batch_traces=32",
    "evaluation.problems=8",
]
pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run_dir(ray_local, tmp_path_factory):
    """A finished run of the demo recipe, made small."""
    uri = str(tmp_path_factory.mktemp("runs") / "small")
    distill.distill(uri, Choices("demo", SETS))
    return Store(uri)


@pytest.fixture
def copy_of(tmp_path):
    """Copies a run directory, to be spoiled."""
    return lambda store: Store(str(shutil.copytree(store.uri, tmp_path / "copy")))


def live_rows(store, number):
    table = joined_round(open_round(store, store.load_run(), "rounds", number))
    return table.filter(pa.compute.is_null(table["reject_reason"])).to_pylist()


def test_every_row_is_accounted_for_from_source_to_loss(run_dir):
    for number in range(ROUNDS):
        where = area("rounds", number)
        for plan_stage in PLAIN:
            rows = sum(entry.rows for entry in run_dir.entries(where, plan_stage.name).values())
            assert rows == (PROMPTS if plan_stage.key == "prompt_id" else PROMPTS * GROUP), plan_stage.name
        table = round_table(run_dir, number)
        rejected = table.num_rows - table["reject_reason"].null_count
        trained = [row for row in run_dir.metrics() if row["writer"] == "train" and row["round"] == number]
        assert sum(row["traces"] for row in trained) + rejected == PROMPTS * GROUP
        assert len(trained) == 2


def test_every_row_names_the_policy_its_round_asked_for(run_dir):
    for number in range(ROUNDS):
        rows = live_rows(run_dir, number)
        assert {row["policy_version"] for row in rows if row["trace_source"] == "student"} == {number}
        assert {row["policy_version"] for row in rows if row["trace_source"] == "teacher"} == {0}
        assert {row["sample_index"] for row in rows if row["trace_source"] == "teacher"} == {GROUP - 1}


def test_stored_signals_agree_with_transformers_and_peft_in_fp32(run_dir):
    """100 rows, of both rounds: |difference| <= 1e-4 nat in every token."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def forward(model, prompt, response):
        ids = torch.tensor([prompt + response])
        with torch.inference_mode():
            logp = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        return logp.gather(1, torch.tensor(response)[:, None])[:, 0].numpy(), -(logp.exp() * logp).sum(-1).numpy()

    checked = 0
    for number in range(ROUNDS):
        model = AutoModelForCausalLM.from_pretrained(asset_path(), dtype=torch.float32).eval()
        student = model if number == 0 else PeftModel.from_pretrained(model, run_dir.policy(number).adapter).eval()
        for row in live_rows(run_dir, number)[:50]:
            logp, _ = forward(student, row["prompt_tokens"], row["response_tokens"])
            np.testing.assert_allclose(row["student_logprobs"], logp, atol=1e-4)
            if number:
                with student.disable_adapter():
                    logp, entropy = forward(student, row["teacher_prompt_tokens"], row["response_tokens"])
            else:
                logp, entropy = forward(model, row["teacher_prompt_tokens"], row["response_tokens"])
            np.testing.assert_allclose(row["teacher_logprobs"], logp, atol=1e-4)
            np.testing.assert_allclose(row["teacher_entropy"], entropy, atol=1e-4)
            assert (row["entropy_method"], row["entropy_error"]) == ("exact", 0.0)
            checked += 1
    assert checked == 100


def test_the_measured_gap_between_generation_and_scoring_is_stored(run_dir):
    gaps = [row["student_logprob_gap"] for row in live_rows(run_dir, 1) if row["student_logprob_gap"] is not None]
    assert gaps
    assert max(gaps) <= 1e-4


def test_running_it_again_does_nothing_and_says_so(run_dir, capfd):
    before = {path: path.stat().st_mtime_ns for path in run_dir.local_root.rglob("*.parquet")}
    distill.distill(run_dir.uri, Choices())
    assert "Nothing to do" in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.local_root.rglob("*.parquet")}


def test_training_again_on_the_stored_traces_gives_the_very_same_policy(run_dir, trained_here, copy_of, capfd):
    again = copy_of(run_dir)
    train.train_committed(again.uri, 1, [], None, False, train.Target(replace=True))
    assert "trained rounds 1 to 1" in capfd.readouterr().out
    assert again.read_json("policy/0002/manifest.json") == run_dir.read_json("policy/0002/manifest.json")


def test_another_objective_gives_another_policy_and_its_evaluation_is_stale(run_dir, trained_here, copy_of, capfd):
    again = copy_of(run_dir)
    train.train_committed(again.uri, 0, ["objective.name=grpo"], None, False, train.Target(replace=True))
    assert again.read_json("policy/0002/manifest.json") != run_dir.read_json("policy/0002/manifest.json")
    capfd.readouterr()
    status.show(again.uri, False)
    said = capfd.readouterr().out
    assert "stale: evaluation of policy 2 (policy changed)" in said
    assert "stale: rollout of round 1, 2 of 2 shards (policy changed)" in said
    train.train_committed(again.uri, 0, ["objective.name=cl_egrsd"], None, False, train.Target(replace=True))
    assert again.read_json("policy/0002/manifest.json") == run_dir.read_json("policy/0002/manifest.json")


@pytest.mark.parametrize("evaluated", [True, pytest.param(False, marks=pytest.mark.chaos)])
def test_a_run_that_was_cut_off_resumes_where_it_stopped_and_ends_the_same(run_dir, trained_here, copy_of, evaluated):
    """As after a kill while round 1 was graded: one shard, the policy and everything behind it are missing.

    An engine is asked for the policy's evaluation alone. Where that is there, a fake engine would spoil what it were asked for.

    A grade is exact; a shard scored again may differ in the last bits, with what shared its batches.
    """
    cut = copy_of(run_dir)
    for path in ("policy/0002", "train/0002", "rounds/0001/profile", "rounds/0001/label", "rounds/0001/ready.json"):
        cut.delete(path)
    if not evaluated:
        cut.delete("evals/0002")
    cut.delete("rounds/0001/grade/0001.json")
    cut.delete("metrics/0001-train.jsonl")
    kept = {path: path.stat().st_mtime_ns for path in cut.local_root.glob("rounds/000*/rollout/*")}
    distill.distill(cut.uri, Choices(), engine_class=FakeEngine if evaluated else None)
    assert kept == {path: path.stat().st_mtime_ns for path in cut.local_root.glob("rounds/000*/rollout/*")}
    assert cut.read_json("policy/0002/manifest.json") == run_dir.read_json("policy/0002/manifest.json")
    for plan_stage in PLAIN:
        hashes = [{e.sha256 for e in s.entries("rounds/0001", plan_stage.name).values()} for s in (cut, run_dir)]
        assert hashes[0] == hashes[1], plan_stage.name


def test_relabelling_touches_no_engine_and_status_says_what_is_stale(run_dir, capfd):
    old = run_dir.entries(area("rounds", 0), "label")
    stage.run_stage(run_dir.uri, stage.Redo("label", "0", ["label.gamma=1.0"]))
    said = capfd.readouterr().out
    assert "2 shards computed" in said
    assert "now stale: label of round 1, 2 of 2 shards (settings)" in said
    new = run_dir.entries(area("rounds", 0), "label")
    assert {e.sha256 for e in new.values()} != {e.sha256 for e in old.values()}
    run = run_dir.load_run()
    stale = {
        (number, plan_stage.name)
        for number in range(ROUNDS)
        for plan_stage in PLAIN
        for work in [open_round(run_dir, run, "rounds", number)]
        for shard in work.shards
        if Inventory(work, whole=False).why_stale(plan_stage, shard)
    }
    assert stale == {(1, "label")}
    status.show(run_dir.uri, False)
    assert "stale: label of round 1, 2 of 2 shards (settings)" in capfd.readouterr().out


def test_export_is_plain_parquet_with_every_column(run_dir, tmp_path):
    export.export_run(run_dir.uri, str(tmp_path / "out"), False)
    table = pq.read_table(tmp_path / "out")
    assert table.num_rows == ROUNDS * PROMPTS * GROUP
    always = {c.name for c in contract.COLUMNS.values() if not c.optional and c.writer != "reward"}
    assert {"round", "reject_reason", *always} <= set(table.column_names)
    row = table.filter(pa.compute.is_null(table["reject_reason"])).slice(0, 1).to_pylist()[0]
    assert len(row["gate"]) == len(row["response_tokens"]) == len(row["token_weight"])


def test_evaluations_and_metadata_are_there(run_dir):
    run = run_dir.load_run()
    assert len(held_out(run_dir, run, 0)) == len(held_out(run_dir, run, ROUNDS)) == 8
    assert {"ray", "torch", "pyarrow"} <= json.loads((run_dir.local_root / "run.json").read_text())["versions"].keys()


@pytest.mark.chaos
def test_two_engines_and_other_shards_write_the_very_same_traces(run_dir, ray_local):
    """Round 0 again on a pool of two real engines, all prompts in one batch and one by one."""
    from actors.pool.pool import EnginePool
    from pipeline import stages

    run = run_dir.load_run()
    settings = run.engines.rollout.model_copy(update={"min": 2, "max": 2, "threads": 1})
    pool = EnginePool.start("twice", run.model, settings, run.score)

    def rolled_out(first, shard):
        prompts = run_dir.read(run_dir.entry(area("rounds", 0), "prompts", shard))
        return stages.rollout.rollout(prompts, run, pool, contract.Policy(0), contract.Place(area("rounds", 0), first))

    try:
        until(lambda: [engine.state for engine in pool.overview().engines] == ["serving", "serving"], 300, "two engines serve")
        with ThreadPoolExecutor(2) as both:
            tables = list(both.map(rolled_out, (0, 4), ("0000", "0001")))
        for table, shard in zip(tables, ("0000", "0001"), strict=True):
            stored = run_dir.read(run_dir.entry(area("rounds", 0), "rollout", shard))
            for name in ("trace_id", "response_tokens", "seed"):
                assert table[name].equals(stored[name]), name
        assert {engine.rows > 0 for engine in pool.overview().engines} == {True}
    finally:
        pool.close()


def test_engine_and_trainer_that_take_turns_write_the_very_same_traces(run_dir, ray_local, trained_here, tmp_path, monkeypatch):
    """The protocol of one card. A CPU engine cannot sleep, so it ends before each step and another starts for the next round."""
    from ray._private.state import actors

    def engines(state):
        return {a["Name"] for a in actors().values() if (a["ActorClassName"], a["State"]) == ("EngineActor", state)}

    def watched(self, data):
        beside.append((data.number, engines("ALIVE")))
        yield from train_round(self, data)

    beside, train_round, before = [], Trainer.train_round, engines("DEAD")
    monkeypatch.setattr(Trainer, "train_round", watched)
    uri = str(tmp_path / "turns")
    distill.distill(uri, Choices("demo", [*SETS, "evaluation.problems=0", "engines.rollout.colocate=true"]))
    assert beside == [(0, set()), (1, set())]
    assert len(engines("DEAD") - before) == ROUNDS
    turns = Store(uri)
    for number in range(ROUNDS):
        for row, expected in zip(live_rows(turns, number), live_rows(run_dir, number), strict=True):
            assert (row["trace_id"], row["response_tokens"]) == (expected["trace_id"], expected["response_tokens"])
            for name in ("student_logprobs", "teacher_logprobs", "teacher_entropy"):
                np.testing.assert_allclose(row[name], expected[name], atol=1e-4)
        adapters = [load_file(store.fetch(area("policy", number + 1)) / ADAPTER) for store in (turns, run_dir)]
        for name, weight in adapters[0].items():
            torch.testing.assert_close(weight, adapters[1][name], atol=1e-4, rtol=0)


def test_nothing_temporary_remains(run_dir):
    assert not [p for p in run_dir.local_root.rglob("*") if p.name.startswith(".tmp") and (p.is_file() or any(p.iterdir()))]
