"""Training of all weights: its gradients, two ranks, resume, what is published, and what is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families.models import COMMON
from safetensors.torch import load_file
from steps import engine_logprobs
from torch import multiprocessing
from training_rounds import commit_round, make_round, tiny_run
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config import Model
from pipeline.errors import ModelError, SettingError, TrainingError
from pipeline.models.resolve import resolve_model
from pipeline.models.warmstart import build_tokenizer
from pipeline.overrides import resolve
from pipeline.store.directory import Store, area
from pipeline.store.folders import drop_weights, is_weights, read_manifest
from pipeline.training import batches, checkpoint, rank
from pipeline.training.agreement import gap
from pipeline.training.step import Trainer
from pipeline.training.student import head, student, whole
from pipeline.training.student.trained_head import trained

CPU = torch.device("cpu")
FULL = ("model.tuning=full", "train.learning_rate=0.0001", "train.batch_traces=13")
STRATEGIES = ("ddp", "fsdp2")


def full_run(*overrides: str):
    return tiny_run(*FULL, *overrides)


def trainer(run) -> Trainer:
    return Trainer(run, student.build(run, CPU), CPU)


def rounds(made: Trainer, *numbers: int) -> list[dict]:
    return [row for number in numbers for row in made.train_round(make_round(number, num_traces=13))]


@pytest.mark.parametrize(("tied", "bias"), [(False, True), (True, False)])
def test_the_chunked_head_gives_the_gradients_of_full_logits(tied: bool, bias: bool) -> None:
    torch.manual_seed(0)
    tokens, targets, coefficients = torch.randint(11, (9,)), torch.randint(11, (9,)), torch.randn(9)
    embedding, other = (torch.randn(11, 6, requires_grad=True) for _ in range(2))
    weight, offset = embedding if tied else other, torch.randn(11, requires_grad=True) if bias else None
    hidden = embedding[tokens].tanh()
    logprobs = torch.nn.functional.linear(hidden, weight, offset).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    leaves = [leaf for leaf in (embedding, None if tied else weight, offset) if leaf is not None]
    expected = torch.autograd.grad((coefficients * logprobs).sum() * 0.7, leaves)
    hidden = embedding[tokens].tanh()
    terms = head.Terms(targets, coefficients)
    plain = head.Head(weight.detach(), None if offset is None else offset.detach(), chunk=4)
    total, found = trained(hidden, (weight, offset), plain, terms)
    assert (found - logprobs).abs().max() < 1e-5
    for got, wanted in zip(torch.autograd.grad(total * 0.7, leaves), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_step_has_the_gradient_of_the_plain_loss_on_every_weight() -> None:
    made = trainer(full_run())
    run = made.run
    traces = batches.usable(make_round(num_traces=4), run.max_staleness, run.objective)
    share = batches.share(traces, torch.arange(4).numpy(), 0, 1, run.train.micro_batch_tokens)
    found = made.gradient(share)
    loss = torch.zeros(())
    whole_batch = made.whole(share)
    for micro in share:
        coefficients = made._terms(micro, whole_batch)[1].coefficients
        logits = made.student.model(input_ids=micro.tokens, use_cache=False).logits.flatten(0, 1)[micro.sources]
        loss = loss + (coefficients * logits.log_softmax(-1).gather(1, micro.targets[:, None])[:, 0]).sum()
    expected = torch.autograd.grad(loss, list(made.parameters().values()))
    flat = torch.cat([part.flatten() for part in expected])
    assert (found - flat).norm() < 1e-4 * flat.norm()


def rank_main(number: int, folder: str) -> None:
    """One of two ranks: both strategies, and both again from a saved state."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(number), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=2)
    for strategy in STRATEGIES:
        run = full_run(f"train.strategy={strategy}")
        made = trainer(run)
        store, base = Store(str(Path(folder, strategy, "run"))), checkpoint.gather(made)
        metrics = rounds(made, 0)
        first, answered = checkpoint.gather(made), checkpoint.probe(made).logprobs
        checkpoint.save(made, 1, first, Path(folder, strategy, "state"))
        if number == 0:
            checkpoint.save_policy(made, first, Path(folder, strategy, "first"))
            store.publish_policy(1, Path(folder, strategy, "first"))
        torch.distributed.barrier()
        metrics += rounds(made, 1)
        for version, expected in enumerate((base, first)):
            own, before = checkpoint.gather(made), checkpoint.probe(made).logprobs
            with gap.as_answered(made.module, made.parameters(), rank._weights_of(made, store, version)):
                seen = checkpoint.gather(made)
                answers = student.answers(made.module, CPU, whole.sequence(made.student.vocab_size, run.model.max_model_len))
            assert answers == pytest.approx((made.student.base_answers, answered)[version], abs=1e-5)
            assert checkpoint.probe(made).logprobs == before  # no weight of the other policy stays gathered
            assert all(torch.equal(seen[name], value) for name, value in expected.items()), version
            assert all(torch.equal(own[name], value) for name, value in checkpoint.gather(made).items()), version
        weights, probe = checkpoint.gather(made), checkpoint.probe(made)
        torch.distributed.barrier()
        model = student.build(run, CPU)
        checkpoint.load_policy(model, Path(folder, strategy, "state"), run.model)
        again = Trainer(run, model, CPU)
        checkpoint.load_optimizer(again, Path(folder, strategy, "state"))
        rounds(again, 1)
        resumed = checkpoint.gather(again)
        if number == 0:
            checkpoint.save_policy(made, weights, Path(folder, strategy, "policy"))
            same = all(torch.equal(weights[name], resumed[name]) for name in weights)
            Path(folder, strategy, "told.json").write_text(json.dumps([metrics, same, probe.logprobs]))
        else:
            assert weights == resumed == {}
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    multiprocessing.spawn(rank_main, (str(folder),), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def alone() -> tuple[Trainer, list[dict]]:
    made = trainer(full_run())
    return made, rounds(made, 0, 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_equal_one_and_resume_to_the_same_bits(two_ranks: Path, alone, strategy: str) -> None:
    metrics, same, probe = json.loads((two_ranks / strategy / "told.json").read_text())
    assert same, "a resumed run has other weights than one that went on"
    for one, two in zip(alone[1], metrics, strict=True):
        for name in ("loss", "grad_norm", "tokens", "peak_entropy"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    saved = load_file(two_ranks / strategy / "policy" / "model.safetensors")
    for name, weight in alone[0].parameters().items():
        assert (saved[name] - weight).abs().max() < 2e-5, name
    assert probe == pytest.approx(checkpoint.probe(alone[0]).logprobs, abs=1e-3)


@pytest.mark.parametrize("overrides", [(), ("train.dtype=bfloat16", "model.dtype=bfloat16", "train.gradient_checkpointing=true")])
def test_a_killed_trainer_resumes_to_the_same_bits_and_publishes_what_transformers_opens(tmp_path: Path, overrides) -> None:
    stores, run = [Store(str(tmp_path / name)) for name in ("once", "killed")], full_run(*overrides)
    for store in stores:
        made = rank.resume(store, run, CPU)
        for number in range(2):
            commit_round(store, make_round(number))
            if store is stores[1]:
                made = rank.resume(store, run, CPU)
            assert rank.train_round(made, store, number)
    assert len({str(store.read_json(f"{area('policy', 2)}/manifest.json")) for store in stores}) == 1
    assert {p.dtype for p in made.parameters().values()} == {torch.float32}
    folder = stores[0].fetch(area("policy", 2))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == getattr(torch, run.model.dtype)
    probe = whole.read_probe(folder)
    assert probe.dtype == run.train.dtype
    ids = torch.tensor([probe.tokens])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    gap = (logprobs - torch.tensor(probe.logprobs)).abs().mean()
    assert gap < (1e-5 if run.model.dtype == "float32" else 0.1)
    assert (torch.tensor(probe.base_logprobs) - torch.tensor(probe.logprobs)).abs().mean() > 1e-4


@pytest.mark.parametrize(
    ("kind", "own"),
    [("afmoe", {"num_dense_layers": 0, "layer_types": ["full_attention"] * 2}), ("ernie4_5_moe", {"moe_layer_start_index": 0})],
)
def test_weights_that_a_class_freezes_are_not_trained_and_go_along(tmp_path: Path, kind: str, own: dict) -> None:
    """Transformers unfreezes what it loads. A router's correction gets no gradient, so no moments to resume from."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **experts, **own}))
    biases = {name: p for name, p in base.named_parameters() if not p.requires_grad}
    assert len(biases) == 2
    for bias in biases.values():
        bias.data.normal_(0, 0.01)
    base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    run = full_run(f"model.path={tmp_path / 'base'}", "model.dtype=bfloat16")
    made = trainer(run)
    assert not biases.keys() & made.parameters().keys()
    rounds(made, 0)
    checkpoint.save_policy(made, checkpoint.gather(made), tmp_path / "policy")
    checkpoint.save(made, 1, checkpoint.gather(made), tmp_path / "state")
    published = checkpoint.whole_weights(made.student, whole.at(run.model, tmp_path / "policy"), torch.float32)
    assert all(torch.equal(published[name], bias) for name, bias in biases.items()), (
        "engines would get other biases, or rounded ones"
    )
    again = student.build(run, CPU)
    checkpoint.load_policy(again, tmp_path / "state", run.model)
    resumed = Trainer(run, again, CPU)
    assert checkpoint.load_optimizer(resumed, tmp_path / "state") == 1
    assert all(torch.equal(p, made.parameters()[name]) for name, p in resumed.parameters().items())


def test_a_stale_round_is_compared_under_the_weights_that_answered(tmp_path: Path) -> None:
    """Rounds 0 and 1 were both answered by policy 0. The second one is trained by policy 1."""
    store, run = Store(str(tmp_path)), full_run("max_staleness=1", "train.logprob_gap=null", "train.logprob_gap_max=null")
    made = rank.resume(store, run, CPU)
    made.student.eval()
    known = [engine_logprobs(made, make_round(number)) for number in (0, 1, 2)]
    made.student.train()
    commit_round(store, make_round(student_logprobs=known[0]))
    assert rank.train_round(made, store, 0)
    stale = replace(make_round(1, student_logprobs=known[1], policy_version=[0] * 12), policy_version=0)
    commit_round(store, stale)
    before = {name: p.detach().clone() for name, p in made.parameters().items()}
    assert rank.train_round(made, store, 1)
    [gaps] = [row for row in store.metrics() if row["round"] == 1 and "logprob_gap" in row]
    assert gaps["logprob_gap_max"] < 2e-5
    moved = max(float((before[name] - p.detach()).abs().max()) for name, p in made.parameters().items())
    assert 0 < moved < 1.5e-4  # a step of the learning rate from policy 1; from policy 0 there are two
    wrong = [[value - 0.5 for value in row] for row in known[2]]
    commit_round(store, replace(make_round(2, student_logprobs=wrong, policy_version=[0] * 12), policy_version=0))
    with pytest.raises(TrainingError, match=r"disagree about policy 0: .* by 0\.5 at most"):
        list(made.train_round(replace(rank._round(made, store, 2), number=1)))


def test_a_policy_whose_weights_were_dropped_is_not_compared(tmp_path: Path) -> None:
    store, run = Store(str(tmp_path)), full_run()
    made = rank.resume(store, run, CPU)
    commit_round(store, make_round())
    assert rank.train_round(made, store, 0)
    assert rank._weights_of(made, store, 1).keys() == made.parameters().keys()
    drop_weights(store, area("policy", 1))
    assert rank._weights_of(made, store, 1) is None
    assert rank._weights_of(made, store, 7) is None


def test_policies_that_nobody_needs_lose_their_weights(tmp_path: Path) -> None:
    store, run = Store(str(tmp_path)), full_run()
    made = rank.resume(store, run, CPU)
    for number in range(4):
        commit_round(store, make_round(number))
        assert rank.train_round(made, store, number)
    kept = {version: [is_weights(f.name) for f in (tmp_path / area("policy", version)).iterdir()] for version in (1, 2, 3, 4)}
    assert {version: any(names) for version, names in kept.items()} == {1: True, 2: False, 3: True, 4: True}
    assert read_manifest(store, area("policy", 2)).dropped
    assert store.numbers("train") == [3, 4]


def test_weights_go_into_a_student_from_a_policy_and_from_a_state(alone, tmp_path: Path) -> None:
    made = alone[0]
    checkpoint.save_policy(made, checkpoint.gather(made), tmp_path / "policy")
    checkpoint.save(made, 2, checkpoint.gather(made), tmp_path / "state")
    assert checkpoint.distance(tmp_path / "policy", tmp_path / "policy") == 0
    for name in ("policy", "state"):
        model = student.build(full_run(), CPU)
        checkpoint.load_policy(model, tmp_path / name, full_run().model)
        for key, weight in made.parameters().items():
            assert torch.equal(dict(model.model.named_parameters())[key], weight), key
    assert {file.suffix for file in (tmp_path / "state").iterdir()} == {".safetensors", ".json"}


def test_large_states_are_written_in_parts(alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "SHARD_BYTES", 300_000)
    made = alone[0]
    checkpoint.save(made, 2, checkpoint.gather(made), tmp_path)
    assert len(list(tmp_path.glob("weights-*.safetensors"))) > 8
    model = student.build(full_run(), CPU)
    checkpoint.load_policy(model, tmp_path, full_run().model)
    again = Trainer(full_run(), model, CPU)
    assert checkpoint.load_optimizer(again, tmp_path) == 2
    moments = [value["exp_avg_sq"] for value in again.optimizer.state.values()]
    assert all(torch.equal(one, two["exp_avg_sq"]) for one, two in zip(moments, made.optimizer.state.values(), strict=True))


def test_an_adapter_is_refused_by_a_run_that_trains_all_weights_and_the_other_way_round(alone, tmp_path: Path) -> None:
    lora = trainer(tiny_run())
    checkpoint.save_policy(lora, checkpoint.gather(lora), tmp_path / "adapter")
    checkpoint.save_policy(alone[0], checkpoint.gather(alone[0]), tmp_path / "whole")
    with pytest.raises(ModelError, match=r"holds an adapter, and model\.tuning is full"):
        checkpoint.load_policy(student.build(full_run(), CPU), tmp_path / "adapter", full_run().model)
    with pytest.raises(ModelError, match=r"no adapter here: adapter_config\.json is missing"):
        checkpoint.load_policy(student.build(tiny_run(), CPU), tmp_path / "whole", tiny_run().model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("teachers.slow.policy=ema:0.9",), "ema is a mean of adapters"),
        (("train.dtype=float16",), "trains in float32 or bfloat16"),
        (("teachers.late.policy=lag:2", "train.keep_policies=2"), "drops policies"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(settings, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        resolve(tiny_run(), ["model.tuning=full", *settings])


def test_the_base_is_opened_in_float32_whatever_its_checkpoint_has() -> None:
    made = student.build(full_run("train.dtype=bfloat16"), CPU)
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(resolve_model(Model().path), dtype=torch.float32)
    assert torch.equal(made.base.lm_head.weight, base.lm_head.weight)
