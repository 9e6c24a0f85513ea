"""Whole weights in a running engine: after each load it answers as transformers does, and a load that does nothing is noticed."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from whole_engine import ONE

from actors.inference import reload
from pipeline.errors import EngineError, ModelError
from pipeline.models.resolve import asset_path
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.recipes import demo
from pipeline.training.student import whole
from pipeline.training.student.whole import Probe


@torch.no_grad()
def logprobs(model, ids):
    tokens = torch.tensor([ids])
    return model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


def published(base, folder, seed, dtype=torch.float32):
    """A policy: the base with every weight moved, saved as the trainer does. Returns it in float32."""
    torch.manual_seed(seed)
    model = type(base)(base.config).eval()
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 0.1 * torch.randn_like(weight))
    tokens = whole.sequence(base.config.vocab_size, 96)
    model.to(dtype).save_pretrained(folder)
    model.float()
    said = (tuple(logprobs(one, tokens).tolist()) for one in (model, base))
    probe = whole.Probe(**dict(zip(("tokens", "logprobs", "base_logprobs"), (tuple(tokens), *said), strict=True)))
    (folder / whole.PROBE).write_text(probe.model_dump_json())
    return model


def untied(folder):
    """A model whose head has a weight of its own, with the tiny reasoner's tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
    config = LlamaConfig(vocab_size=57, max_position_embeddings=128, tie_word_embeddings=False, eos_token_id=2, **sizes)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    model.save_pretrained(folder)
    tokenizer_of(demo().model).save_pretrained(folder)


def asked(forks, model, tmp_path, policies, dtype="float32"):
    file = tmp_path / "told.json"
    done = forks.script(Path(__file__).with_name("whole_engine.py"), str(model), dtype, str(file), *map(str, policies))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["tied", "untied", "tied, bfloat16"])
def test_each_policy_answers_as_transformers_in_any_order_and_together(vllm_forks, tmp_path, kind):
    path = asset_path() if kind.startswith("tied") else tmp_path / "untied"
    if kind == "untied":
        untied(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    half = kind.endswith("bfloat16")
    models = [base, *(published(base, tmp_path / str(n), n, torch.bfloat16 if half else torch.float32) for n in (1, 2))]
    expected = [logprobs(model, ONE.prompt + ONE.response)[-len(ONE.response) :].numpy() for model in models]
    assert np.abs(expected[1] - expected[2]).max() > 0.3
    told = asked(vllm_forks, path, tmp_path, [tmp_path / "1", tmp_path / "2"], "bfloat16" if half else "float32")
    assert "error" not in told, told
    most = 0.3 if half else 1e-4
    for found in told["orders"]:
        for version, values in found.items():
            assert np.abs(np.array(values) - expected[int(version)]).max() < most, version
    for version, values in told["together"]:
        assert np.abs(np.array(values) - expected[version]).max() < most, version
    tokens, values, version = told["written"]
    assert version == 2
    written = logprobs(models[2], ONE.prompt + tokens)[-len(tokens) :].numpy()
    assert np.abs(np.array(values) - written).max() < most


@pytest.mark.engine
def test_weights_that_do_not_answer_are_noticed(vllm_forks, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(asset_path(), dtype=torch.float32).eval()
    published(base, tmp_path / "1", 1)
    base.save_pretrained(tmp_path / "1")  # the weights of another policy than probe.json tells
    told = asked(vllm_forks, asset_path(), tmp_path, [tmp_path / "1"])
    assert "policy 1 was loaded and does not answer" in told["error"]


class Idle:
    """A vLLM whose reload does nothing. It answers the probe as `answers` says, whatever it was told to load."""

    def collective_rpc(self, *_, **__):
        return True

    apply_model = reset_prefix_cache = collective_rpc


def test_keys_and_values_of_other_weights_that_vllm_keeps_end_the_engine():
    keeping = Idle()
    keeping.reset_prefix_cache = lambda: False
    with pytest.raises(EngineError, match="base: vLLM keeps keys and values of other weights"):
        reload.Reloader("base", "float32")(keeping, None, None)


@pytest.mark.parametrize(("trainers", "refused"), [("bfloat16", False), ("float32", True), ("", True)])
def test_the_coarser_dtype_of_engine_and_trainer_says_how_far_apart_they_may_be(monkeypatch, trainers, refused):
    """A trainer in bfloat16 is .02 nat from an engine in float32. Such a run ended after it had paid for round 0."""
    base, tokens, change = np.linspace(-2, -1, 5), (1, 2, 3, 4, 5, 6), 0.1
    measured = iter([base + 0.02, base + change + 0.02])
    monkeypatch.setattr(reload, "_measure", lambda *_: next(measured))
    probe = Probe(tokens=tokens, logprobs=tuple(base + change), base_logprobs=tuple(base), dtype=trainers)
    with pytest.raises(ModelError, match="compute another base") if refused else contextlib.nullcontext():
        reload.Reloader("base", "float32")(Idle(), reload.Whole(1, "folder", "content", probe), None)


@pytest.mark.parametrize(
    ("dtype", "off", "change"),
    [("float32", 1e-6, 4e-5), ("bfloat16", 1e-2, 5e-2), ("float32", 1e-6, 1e-6), ("bfloat16", 1e-2, 1e-2)],
)
def test_a_reload_that_does_nothing_is_noticed_at_the_first_policy_and_at_the_next(monkeypatch, dtype, off, change):
    """Engine and trainer are `off` nats apart, and each policy moves the trainer by `change`: less than the room for numerics."""
    base, tokens = np.linspace(-2, -1, 5), (1, 2, 3, 4, 5, 6)
    monkeypatch.setattr(reload, "_measure", lambda *_: base + off)
    probes = [Probe(tokens=tokens, logprobs=tuple(base + n * change), base_logprobs=tuple(base)) for n in (1, -1)]
    first, second = (reload.Whole(n, f"folder {n}", f"content {n}", probe) for n, probe in enumerate(probes, 1))
    loads = reload.Reloader("base", dtype)
    if change <= 2 * off:  # nobody could tell
        loads(Idle(), first, None)
        return
    with pytest.raises(ModelError, match="policy 1 was loaded, and the answers are those from before, bit for bit"):
        loads(Idle(), first, None)
    loads._last = reload._Said("content 1", base + change, base + off)
    with pytest.raises(ModelError, match="policy 2 was loaded, and the answers"):
        loads(Idle(), second, first)
