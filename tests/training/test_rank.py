"""What one rank does with a real run directory: resume, wait, train, publish. In the test's process, without Ray."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from training_rounds import commit_round, make_round, tiny_run

from pipeline.config.objective import DISTRIBUTIONAL, OBJECTIVES
from pipeline.contract import TOPK
from pipeline.errors import StoreError, TrainingError
from pipeline.store.directory import Store, area
from pipeline.training import checkpoint, rank

OPTIONAL = (*TOPK, "base_logprobs")


def test_a_stop_ends_a_trainer_that_waits_and_a_round_in_hand_is_left_whole(tmp_path: Path) -> None:
    store, run = Store(str(tmp_path)), tiny_run()
    store.request_stop()
    assert rank.wait(store, 0) is False
    commit_round(store, make_round())
    assert rank.train_round(rank.resume(store, run, torch.device("cpu")), store, 0) is False
    assert store.latest_policy() == 0
    store.request_stop(False)
    assert rank.wait(store, 0) is True


def test_states_are_dropped_only_once_a_newer_policy_is_published(tmp_path: Path) -> None:
    store, run = Store(str(tmp_path)), tiny_run()
    trainer = rank.resume(store, run, torch.device("cpu"))
    for number in (0, 1, 2):
        commit_round(store, make_round(number))
    for number in (0, 1):
        assert rank.train_round(trainer, store, number)
    blocked = tmp_path / "policy/0003"
    blocked.write_text("a file where the policy's folder belongs")
    with pytest.raises(StoreError, match=r"policy/0003.*cannot write"):
        rank.train_round(trainer, store, 2)
    assert store.numbers("train") == [1, 2, 3]
    blocked.unlink()
    resumed = rank.resume(store, run, torch.device("cpu"))
    assert rank.train_round(resumed, store, 2)
    assert store.numbers("train") == [2, 3]


def test_a_policy_without_its_state_is_not_trained_on(tmp_path: Path) -> None:
    store, run = Store(str(tmp_path)), tiny_run()
    commit_round(store, make_round())
    assert rank.train_round(rank.resume(store, run, torch.device("cpu")), store, 0)
    store.delete(area("train", 1))
    with pytest.raises(TrainingError, match="policy 1 has no training state"):
        rank.resume(store, run, torch.device("cpu"))


MORE = dict.fromkeys(DISTRIBUTIONAL, ("score.keep_topk=20",)) | {"sft": ("rollout.teacher_share=0.5",)}


@pytest.mark.parametrize(
    "settings",
    [
        ("objective.name=eopd", "score.keep_topk=20", "objective.gate=cl_entropy"),
        ("objective.name=gkd", "score.keep_topk=20", "objective.correction=token", "objective.normalise=sequence"),
        ("objective.name=iw_opd", "objective.clip=gspo", "objective.kl=0.1", "score.base_logprobs=true"),
        ("objective.name=minillm", "objective.gate=top_entropy:0.3", "objective.control=shuffled"),
        *(pytest.param((f"objective.name={name}", *MORE.get(name, ())), marks=pytest.mark.chaos) for name in OBJECTIVES),
    ],
)
def test_an_objective_with_further_columns_trains_from_shards_and_resumes_to_the_same_bits(tmp_path: Path, settings) -> None:
    stores, run = [Store(str(tmp_path / name)) for name in ("once", "killed")], tiny_run(*settings)
    for store in stores:
        trainer = rank.resume(store, run, torch.device("cpu"))
        for number in range(2):
            commit_round(store, make_round(number), OPTIONAL)
            if store is stores[1]:
                trainer = rank.resume(store, run, torch.device("cpu"))
            assert rank.train_round(trainer, store, number)
    assert len({str(store.read_json(f"{area('policy', 2)}/manifest.json")) for store in stores}) == 1


def test_a_round_whose_shards_lack_a_column_names_the_stage_to_redo(tmp_path: Path) -> None:
    store, run = Store(str(tmp_path)), tiny_run("objective.name=fkl", "score.keep_topk=20")
    commit_round(store, make_round(), ("base_logprobs",))
    with pytest.raises(TrainingError, match=r"round 0: there is no column teacher_topk_tokens.* score\.keep_topk=16"):
        rank.train_round(rank.resume(store, run, torch.device("cpu")), store, 0)
    assert store.latest_policy() == 0


def test_a_resume_trains_the_rounds_after_the_last_state_again_to_the_same_bits(tmp_path: Path, caplog) -> None:
    stores = [Store(str(tmp_path / name)) for name in ("every", "third")]
    runs = [tiny_run("rounds=5", *more) for more in ((), ("train.checkpoint_every=3",))]
    for store, run in zip(stores, runs, strict=True):
        for number in range(5):
            commit_round(store, make_round(number))
        trainer = rank.resume(store, run, torch.device("cpu"))
        for number in range(4):
            if number == 2:  # before any state
                trainer = rank.resume(store, run, torch.device("cpu"))
            assert rank.train_round(trainer, store, number)
    every, third = stores
    assert third.numbers("train") == [3]
    with caplog.at_level("INFO"):
        resumed = rank.resume(third, runs[1], torch.device("cpu"))
    assert "policy 4 was trained again: its weights differ from the published ones by at most 0" in caplog.text
    assert rank.train_round(resumed, third, 4)
    assert third.numbers("train") == [3, 5]  # the last round always leaves a state
    assert rank.train_round(rank.resume(every, runs[0], torch.device("cpu")), every, 4)
    for version in range(1, 6):
        assert len({str(store.read_json(f"{area('policy', version)}/manifest.json")) for store in stores}) == 1
    assert every.read_json("train/0005/manifest.json") == third.read_json("train/0005/manifest.json")


def test_only_the_weights_of_policies_that_somebody_needs_are_kept(tmp_path: Path) -> None:
    store, run = Store(str(tmp_path)), tiny_run("rounds=6", "train.keep_policies=2")
    store.write_json("evals/0003/plan.json", {"policy": 3, "shards": {"0000": [0]}})
    trainer = rank.resume(store, run, torch.device("cpu"))
    hashes = []
    for number in range(6):
        commit_round(store, make_round(number))
        assert rank.train_round(trainer, store, number)
        hashes.append(store.read_json(f"{area('policy', number + 1)}/manifest.json")["files"])
    kept = [version for version in range(1, 7) if store.read_bytes(f"{area('policy', version)}/adapter_model.safetensors")]
    assert kept == [1, 3, 5, 6]
    assert [store.read_json(f"{area('policy', version)}/manifest.json")["files"] for version in range(1, 7)] == hashes
    assert store.latest_policy() == 6
    for version in (2, 4):
        with pytest.raises(StoreError, match=r"its weights were dropped, as train\.keep_policies asked"):
            store.check_policy(version)
    store.check_policy(3)


def test_a_policy_is_published_in_the_dtype_of_the_engines_and_the_state_in_full(tmp_path: Path) -> None:
    store, run = Store(str(tmp_path)), tiny_run("model.dtype=bfloat16", "train.dtype=bfloat16")
    commit_round(store, make_round())
    assert rank.train_round(rank.resume(store, run, torch.device("cpu")), store, 0)
    policy, state = (load_file(tmp_path / f"{kind}/0001/adapter_model.safetensors") for kind in ("policy", "train"))
    assert {tensor.dtype for tensor in policy.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.equal(policy[name], state[name].to(torch.bfloat16)) for name in state)


SMALL = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
EXPERTS = {
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_a_mixture_of_experts_resumes_to_the_same_bits_and_publishes_what_peft_opens(tmp_path: Path, family: str) -> None:
    """With attention as targets; experts are refused as targets. No engine here serves such a model, so peft answers for it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL | EXPERTS[family])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    run = tiny_run(f"model.path={tmp_path / 'model'}", "model.lora_targets=[q_proj,k_proj,v_proj,o_proj]")
    stores = [Store(str(tmp_path / name)) for name in ("once", "killed")]
    for store in stores:
        made = rank.resume(store, run, torch.device("cpu"))
        for number in range(2):
            commit_round(store, make_round(number))
            if store is stores[1]:
                made = rank.resume(store, run, torch.device("cpu"))
            assert rank.train_round(made, store, number)
    assert len({str(store.read_json(f"{area('policy', 2)}/manifest.json")) for store in stores}) == 1
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = peft.PeftModel.from_pretrained(base, stores[0].fetch(area("policy", 2))).eval()
    probe = checkpoint.probe(made)
    ids = torch.tensor([probe.tokens])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert logprobs.tolist() == pytest.approx(probe.logprobs, abs=1e-4)
    assert logprobs.tolist() != pytest.approx(made.student.base_answers, abs=1e-2)
