"""The base of trainer and engines is compared before anything is paid for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_rounds import tiny_run

from pipeline.contract import Failure, Score
from pipeline.errors import EngineError, StoreError, TrainingError
from pipeline.models.resolve import asset_path
from pipeline.overrides import resolve
from pipeline.store.directory import Store
from pipeline.training import checkpoint, rank
from pipeline.training.agreement import base_model


class Pool:
    """An engine whose log-probs are `off` nats from those of `known`, and `deaf` to the adapters of some targets."""

    def __init__(self, known, off=0.0, engine="vllm", failure=None, deaf=()):
        self.known, self.off, self.engine, self.failure, self.deaf = known, off, engine, failure, deaf

    def facts(self):
        return SimpleNamespace(engine=self.engine)

    def score(self, sequences, policy):
        assert policy.version == 0
        [one] = sequences
        assert (one.prompt + one.response) == list(self.known.tokens)
        told = {one.target: one.logprobs for one in self.known.adapted if one.target not in self.deaf}
        told = self.known.logprobs if policy.adapter is None else told.get(Path(policy.adapter).name, self.known.logprobs)
        values = np.asarray(told, np.float32) + self.off
        return [self.failure or Score(np.array(one.response), values, values, 0.0)]


def other(*sets):
    """A run with the shipped model under another name, so that it is not known to do."""
    return resolve(tiny_run(), [f"model.path={asset_path()}", "train.logprob_gap=null", *sets])


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A store in which a real trainer has written what its base answers."""
    store, run = Store(str(tmp_path_factory.mktemp("base"))), other()
    store.save_run(run, {})
    rank.tell_base(rank.resume(store, run, torch.device("cpu")), store)
    return store


def known(store):
    return store.read_document(base_model.FILE, base_model.Answered)


def test_the_trainer_tells_what_the_model_itself_answers(told):
    found = known(told)
    assert len(found.logprobs) == len(found.tokens) - 1 == 39
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(asset_path(), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([found.tokens])).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, torch.tensor(found.tokens)[1:, None])[:, 0]
    assert found.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("dtype", "off", "accepted"), [("float32", 9e-4, True), ("float32", 2e-3, False), ("bfloat16", 0.4, True)]
)
def test_an_engine_with_another_base_ends_the_run_before_it_begins(told, dtype, off, accepted):
    run, pool = other(f"model.dtype={dtype}"), Pool(known(told), off)
    if accepted:
        base_model.compare(told, run, {"rollout": pool}, lambda: None)
        return
    with pytest.raises(TrainingError, match=r"another model: their log-probs of the base differ by 0\.002 nat on average"):
        base_model.compare(told, run, {"rollout": pool}, lambda: None)
    base_model.compare(told, other("train.logprob_gap=1e-3"), {"rollout": pool}, lambda: None)  # ten of them are accepted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # ten times bfloat16's tolerance is half a nat
def test_an_engine_that_does_not_apply_the_adapter_of_one_target_ends_the_run_before_it_begins(told, dtype):
    """One adapter of all targets hid that one of seven was left out: bfloat16 accepted half of what all together moved."""
    targets = [one.target for one in known(told).adapted]
    assert sorted(targets) == sorted(tiny_run().model.lora_targets)
    for target in targets:
        said = rf"of a random adapter of {target} differ by .*Take {target} out of model.lora_targets"
        with pytest.raises(TrainingError, match=said):
            base_model.compare(told, other(f"model.dtype={dtype}"), {"rollout": Pool(known(told), deaf=[target])}, lambda: None)


def test_the_adapter_that_was_tried_is_the_trainers_and_leaves_no_trace(tmp_path):
    """The stored adapters give the log-probs that are told, B is zero again, and the folders go after the check."""
    store, run = Store(str(tmp_path)), other()
    store.save_run(run, {})
    made = rank.resume(store, run, torch.device("cpu"))
    rank.tell_base(made, store)
    found = known(store)
    assert all(np.abs(np.subtract(one.logprobs, found.logprobs)).mean() > 0.6 for one in found.adapted)
    assert all((p == 0).all() for name, p in made.parameters().items() if "lora_B" in name)
    for one in found.adapted:
        checkpoint.load_adapter(made.student, tmp_path / base_model.ADAPTER / one.target, run.model)
        assert checkpoint.probe(made).logprobs == pytest.approx(one.logprobs, abs=1e-5)
    base_model.compare(store, run, {"rollout": Pool(found)}, lambda: None)
    assert not (tmp_path / base_model.ADAPTER).exists()


def test_the_engine_that_scores_is_asked_and_a_failure_is_its_own(told):
    right, wrong = Pool(known(told)), Pool(known(told), 1.0)
    base_model.compare(told, other(), {"rollout": wrong, "score": right}, lambda: None)
    with pytest.raises(EngineError, match=r"cannot score a sequence with the base \(no room"):
        base_model.compare(told, other(), {"score": Pool(known(told), failure=Failure("no room"))}, lambda: None)
    base_model.compare(told, other(), {"rollout": Pool(known(told), 1.0, engine="fake")}, lambda: None)
    base_model.compare(told, other(), {}, lambda: None)  # imported responses need no engine


def test_the_driver_waits_for_the_trainer_and_hears_of_its_end(tmp_path):
    class Ended(Exception):
        pass

    def look():
        raise Ended

    with pytest.raises(Ended):
        base_model.compare(Store(str(tmp_path)), other(), {"rollout": None}, look)


def test_the_model_that_ships_and_a_shared_card_are_not_asked(tmp_path):
    for run in (tiny_run(), other("engines.rollout.colocate=true", "engines.rollout.placement.gpus=1", "train.placement.gpus=1")):
        assert not base_model.is_asked(run)
        base_model.compare(Store(str(tmp_path)), run, {}, lambda: None)


def test_a_forged_file_is_named(tmp_path):
    store = Store(str(tmp_path))
    store.write_json(base_model.FILE, {"tokens": [1], "logprobs": [float("nan")]})
    with pytest.raises(StoreError, match="Delete the file: the trainer writes it again"):
        base_model.compare(store, other(), {"rollout": None}, lambda: None)
