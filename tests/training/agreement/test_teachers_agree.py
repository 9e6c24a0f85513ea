"""The engines of a teacher with weights of its own are compared with transformers before anything is paid for."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_rounds import tiny_run
from transformers import AutoConfig

from pipeline.contract import Failure, Score
from pipeline.errors import EngineError, StoreError, TrainingError
from pipeline.fit.machine import GIB
from pipeline.models.resolve import asset_path
from pipeline.overrides import resolve
from pipeline.store.directory import Store
from pipeline.training import rank
from pipeline.training.agreement import teachers
from pipeline.training.student.student import attention_for


class Pool:
    """An engine whose log-probs are `off` nats from those of `known`."""

    def __init__(self, known, off=0.0, engine="vllm", failure=None):
        self.known, self.off, self.engine, self.failure = known, off, engine, failure

    def facts(self):
        return SimpleNamespace(engine=self.engine)

    def score(self, sequences, policy):
        [one] = sequences
        assert (policy.version, policy.adapter) == (0, None)
        assert (one.prompt + one.response) == list(self.known.tokens)
        values = np.asarray(self.known.logprobs, np.float32) + self.off
        return [self.failure or Score(np.array(one.response), values, values, 0.0)]


class Broken(torch.nn.Module):
    """A model whose numbers are not finite."""

    def get_input_embeddings(self):
        return SimpleNamespace(num_embeddings=57)

    def forward(self, ids):
        return SimpleNamespace(logits=torch.full((*ids.shape, 57), torch.nan))


def taught(*sets):
    """A run whose teacher `big` is the shipped model under another name, and is therefore asked."""
    return resolve(tiny_run(), [f"teachers.big.model={asset_path()}", "train.logprob_gap=null", *sets])


@pytest.fixture
def told(tmp_path):
    """A store in which the first rank has written what the teacher answers, and the answer."""
    store = Store(str(tmp_path))
    teachers.tell(taught(), store)
    return store, store.read_document(teachers.FILE, teachers.Answered).answers["big"]


def compared(store, run, pool):
    return list(teachers.compare(store, run, {"teachers.big": pool, "rollout": None}, lambda: None))


def test_the_answer_is_that_of_transformers(told):
    from transformers import AutoModelForCausalLM

    model, answer = AutoModelForCausalLM.from_pretrained(asset_path(), dtype=torch.float32).eval(), told[1]
    with torch.no_grad():
        logits = model(torch.tensor([answer.tokens])).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, torch.tensor(answer.tokens)[1:, None])[:, 0]
    assert len(answer.logprobs) == 39
    assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("dtype", "off", "accepted"), [("float32", 9e-4, True), ("float32", 2e-3, False), ("bfloat16", 0.4, True)]
)
def test_a_teacher_that_its_engines_compute_otherwise_ends_the_run(told, dtype, off, accepted):
    store, answer = told
    run, pool = taught(f"teachers.big.dtype={dtype}"), Pool(answer, off)
    if accepted:
        assert compared(store, run, pool) == []
        return
    with pytest.raises(TrainingError, match=r"teachers\.big: .*another teacher: their log-probs of .* differ by 0\.002 nat"):
        compared(store, run, pool)
    assert compared(store, taught("train.logprob_gap=1e-3"), pool) == []


def test_an_engine_that_cannot_score_is_an_error_of_its_own_and_a_fake_is_not_asked(told):
    store, answer = told
    with pytest.raises(EngineError, match=r"teachers\.big: cannot score a sequence \(no room\)"):
        compared(store, taught(), Pool(answer, failure=Failure("no room")))
    assert compared(store, taught(), Pool(answer, 1.0, engine="fake")) == []


def test_a_teacher_that_is_too_large_or_that_transformers_cannot_load_is_left_out_with_a_word(tmp_path, monkeypatch):
    store = Store(str(tmp_path / "run"))
    folder = tmp_path / "torn"
    shutil.copytree(asset_path(), folder)
    (folder / "model.safetensors").write_bytes(b"torn")
    run = taught(f"teachers.big.model={folder}")
    teachers.tell(run, store)
    [line] = compared(store, run, Pool(None))
    assert line.startswith("teachers.big is not compared with transformers: transformers cannot compute it on this CPU (")
    monkeypatch.setattr(teachers, "open_model", lambda *_, **__: Broken())
    teachers.tell(run, store)
    assert compared(store, run, Pool(None))[0].endswith("its log-probs on this CPU are not finite in float32")
    monkeypatch.setattr(teachers, "free_memory", lambda: GIB // 1024)
    teachers.tell(taught(), store)
    [line] = compared(store, taught(), Pool(None))
    assert line.endswith("GiB of weights are more than half of the 0.000977 GiB that are free")


def test_servers_the_students_own_model_and_a_shared_card_are_not_asked():
    shared = ["engines.rollout.colocate=true", "engines.rollout.placement.gpus=1", "train.placement.gpus=1"]
    shared.append("teachers.big.engines.threads=1")
    assert list(teachers.asked(taught())) == ["big"]
    for sets in (
        ["teachers.big.model=tiny-reasoner"],
        [f"model.path={asset_path()}"],
        ["teachers.big.server=http://host:8000"],
        shared,
    ):
        assert teachers.asked(taught(*sets)) == {}


def test_the_driver_waits_for_the_first_rank_and_hears_of_the_trainers_end(tmp_path):
    class Ended(Exception):
        pass

    def look():
        raise Ended

    with pytest.raises(Ended):
        list(teachers.compare(Store(str(tmp_path)), taught(), {}, look))


def test_the_first_rank_tells_a_driver_that_waits_for_round_0_and_no_other(tmp_path, monkeypatch):
    store, run = Store(str(tmp_path)), taught()
    store.save_run(run, {})
    monkeypatch.setattr(rank, "wait", lambda *_: False)
    rank.train(store, run, torch.device("cpu"))
    assert store.read_document(teachers.FILE, teachers.Answered).answers["big"].logprobs
    store.delete(teachers.FILE)
    monkeypatch.setattr(rank, "resume", lambda *_: SimpleNamespace(rank=0))
    with monkeypatch.context() as later:
        later.setattr(Store, "latest_policy", lambda _: 1)
        rank.train(store, run, torch.device("cpu"))
        assert not (tmp_path / teachers.FILE).exists()
    monkeypatch.setattr(Store, "ready", lambda *_: object())  # `egrsd train` commits its rounds first
    rank.train(store, run, torch.device("cpu"))
    assert not (tmp_path / teachers.FILE).exists()


def test_a_forged_file_is_named(tmp_path):
    store = Store(str(tmp_path))
    store.write_json(teachers.FILE, {"answers": {"big": {"tokens": [1], "logprobs": [float("nan")]}}})
    with pytest.raises(StoreError, match="Delete the file: the trainer writes it again"):
        compared(store, taught(), Pool(None))


def test_a_capped_teacher_is_computed_with_its_cap():
    """Torch's fused attention leaves the cap out, so a right teacher in float32 was called another model."""
    for kind, expected in (("gemma2", {"attn_implementation": "eager"}), ("llama", {})):
        assert attention_for(AutoConfig.for_model(kind)) == expected
