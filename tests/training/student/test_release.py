"""An exported policy answers as its adapter does, in every form that other programs open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from families.models import COMMON
from training_rounds import make_round, tiny_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.config import Model
from pipeline.errors import ModelError, UserError
from pipeline.models.resolve import resolve_model
from pipeline.models.tokenizers.tokenizer import template_hash, tokenizer_of
from pipeline.models.warmstart import build_tokenizer
from pipeline.store.directory import Store
from pipeline.training import checkpoint
from pipeline.training.step import Trainer
from pipeline.training.student import release, student

CPU = torch.device("cpu")
TOKENS = torch.arange(4, 24)[None]
KINDS = ("merged", "adapter")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A trained adapter, and the logits of the student that has it."""
    folder = tmp_path_factory.mktemp("policy")
    made = Trainer(tiny_run(), student.build(tiny_run(), CPU), CPU)
    list(made.train_round(make_round(0)))
    checkpoint.save_policy(made, checkpoint.gather(made), folder)
    return folder, logits(made.student.model.eval())


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def write(policy: Path | None, out: Path, *overrides: str, merge: bool) -> Path:
    out.mkdir(exist_ok=True)
    release.write_model(tiny_run(*overrides), policy, out, merge, [2])
    return out


def test_merged_weights_open_without_peft_and_answer_as_the_adapter(policy, tmp_path: Path) -> None:
    folder = write(policy[0], tmp_path, merge=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert not (folder / "adapter_config.json").exists()
    base = AutoModelForCausalLM.from_pretrained(resolve_model("tiny-reasoner"), dtype=torch.float32)
    assert (logits(model) - policy[1]).abs().max() < 1e-4 < (logits(base) - policy[1]).abs().max()


def test_an_adapter_opens_with_peft_and_with_transformers(policy, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    folder = write(policy[0], tmp_path, merge=False)
    for kind in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        model = kind.from_pretrained(folder, dtype=torch.float32)
        assert (logits(model) - policy[1]).abs().max() < 1e-4, kind.__name__


@pytest.mark.parametrize("merge", [True, False])
def test_tokenizer_and_generation_configuration_go_along(policy, tmp_path: Path, merge: bool) -> None:
    folder = write(policy[0], tmp_path, "evaluation.temperature=0.7", "evaluation.top_p=0.9", merge=merge)
    assert template_hash(AutoTokenizer.from_pretrained(folder)) == template_hash(tokenizer_of(tiny_run().model))
    found = GenerationConfig.from_pretrained(folder)
    assert (found.do_sample, found.temperature, found.top_p, found.top_k, found.eos_token_id) == (True, 0.7, 0.9, 0, 2)


def test_penalties_of_the_base_that_no_figure_was_measured_with_stay_behind(policy, tmp_path: Path, monkeypatch) -> None:
    """Servers apply a repetition_penalty of generation_config.json, and engines here never did."""
    base = GenerationConfig(repetition_penalty=1.1, no_repeat_ngram_size=3, pad_token_id=0, max_new_tokens=5)
    monkeypatch.setattr(release.GenerationConfig, "from_pretrained", lambda *_, **__: base)
    found = release.generation(tiny_run(), [2])
    assert (found.repetition_penalty or 1.0, found.no_repeat_ngram_size or 0, found.max_new_tokens) == (1.0, 0, None)
    assert found.pad_token_id == 0


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_base_whose_generation_options_contradict_each_other_is_published_and_exported(tmp_path: Path, tuning: str) -> None:
    """Vicuna's folder has temperature without do_sample: transformers opens it, and refused to save it after a round."""
    base = tmp_path / "base"
    shutil.copytree(resolve_model("tiny-reasoner"), base)
    odd = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": -1, "temperature": 0.9, "top_p": 0.6}
    (base / "generation_config.json").write_text(json.dumps(odd))
    sets = [f"model.path={base}", f"model.tuning={tuning}"]
    made = Trainer(tiny_run(*sets), student.build(tiny_run(*sets), CPU), CPU)
    checkpoint.save_policy(made, checkpoint.gather(made), tmp_path / "policy")
    found = GenerationConfig.from_pretrained(write(tmp_path / "policy", tmp_path / "out", *sets, merge=True))
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, None)
    assert (found.do_sample, found.temperature, found.top_p) == (True, 1.0, 1.0)
    if tuning == "full":
        inner = GenerationConfig.from_pretrained(tmp_path / "policy")
        assert (inner.bos_token_id, inner.eos_token_id, inner.pad_token_id, inner.temperature) == (1, 2, None, None)


def test_merged_weights_have_the_dtype_of_engines(policy, tmp_path: Path) -> None:
    folder = write(policy[0], tmp_path, "model.dtype=bfloat16", merge=True)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert 0 < (logits(model) - policy[1]).abs().max() < 0.5


def test_policy_0_is_the_base_and_has_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="policy 0 is the base model, which has no adapter"):
        write(None, tmp_path / "adapter", merge=False)
    base = AutoModelForCausalLM.from_pretrained(resolve_model("tiny-reasoner"), dtype=torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(write(None, tmp_path, merge=True))), logits(base))


def test_whole_weights_take_the_terms_of_the_base_along(policy, tmp_path: Path) -> None:
    base = tmp_path / "tiny-reasoner"
    shutil.copytree(resolve_model("tiny-reasoner"), base)
    for name in ("LICENSE.txt", "Notice", "README.md"):
        (base / name).write_text(name)
    merged, adapter = (write(policy[0], tmp_path / kind, f"model.path={base}", merge=kind == "merged") for kind in KINDS)
    assert (merged / "LICENSE.txt").read_text() == "LICENSE.txt"
    assert (merged / "Notice").exists()
    assert not (merged / "README.md").exists()  # the export writes a card of its own
    assert not (adapter / "LICENSE.txt").exists()


def test_a_link_out_of_the_bases_folder_is_not_followed(tmp_path: Path) -> None:
    """A model's folder from an archive had `NOTICE` lead to a key, which the export copied and --push would send."""
    base, out = tmp_path / "base", tmp_path / "out"
    for folder in (base, out):
        folder.mkdir()
    (tmp_path / "key").write_text("secret")
    (base / "terms").write_text("terms")
    (base / "NOTICE").symlink_to(tmp_path / "key")
    (base / "LICENSE").symlink_to("terms")
    release.copy_terms(Model(path=str(base)), out)
    assert [(file.name, file.read_text()) for file in out.iterdir()] == [("LICENSE", "terms")]


def test_the_terms_of_a_hubs_copy_are_links_into_its_blobs(tmp_path: Path) -> None:
    snapshot, out = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "out"
    for folder in (snapshot, tmp_path / "models--x" / "blobs", out):
        folder.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs" / "1").write_text("terms")
    (tmp_path / "models--x" / "key").write_text("secret")
    (snapshot / "LICENSE").symlink_to("../../blobs/1")
    (snapshot / "NOTICE").symlink_to("../../key")
    release.copy_terms(Model(path=str(snapshot)), out)
    assert [(file.name, file.read_text()) for file in out.iterdir()] == [("LICENSE", "terms")]


def test_an_adapter_that_is_lost_in_the_merge_is_noticed(policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(ModelError, match="the merged weights answer otherwise than the adapter"):
        write(policy[0], tmp_path, merge=True)


def test_adapter_and_merged_weights_are_compared_on_plain_text() -> None:
    model = tiny_run().model
    tokenizer, ids = tokenizer_of(model), release.probe_ids(model)
    assert len(ids) > 8
    assert not set(ids) & set(tokenizer.all_special_ids)  # in SmolLM2 they blow float32's rounding up to .01 nat


def test_an_adapter_of_other_settings_is_refused(policy, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the adapter's r is 4, the run asks for 8"):
        write(policy[0], tmp_path, "model.lora_rank=8", merge=True)


@pytest.mark.parametrize("version", [0, 1])
def test_whole_weights_go_out_as_they_are(tmp_path: Path, version: int) -> None:
    run = tiny_run("model.tuning=full", "train.learning_rate=0.0001")
    made = Trainer(run, student.build(run, CPU), CPU)
    list(made.train_round(make_round(0)) if version else ())
    checkpoint.save_policy(made, checkpoint.gather(made), tmp_path / "policy")
    (tmp_path / "out").mkdir()
    release.write_model(run, tmp_path / "policy" if version else None, tmp_path / "out", False, [2])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(made.student.model.eval()))
    assert {"tokenizer.json", "generation_config.json", "config.json"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_a_file_that_the_policy_did_not_publish_is_not_handed_on(tmp_path: Path) -> None:
    """In a run that somebody sent, a link beside the weights led to a file of this machine, and --push would have sent it."""
    run = tiny_run("model.tuning=full")
    made = Trainer(run, student.build(run, CPU), CPU)
    checkpoint.save_policy(made, checkpoint.gather(made), tmp_path / "policy")
    store = Store(str(tmp_path / "run"))
    store.publish_policy(1, tmp_path / "policy")
    (tmp_path / "secret").write_text("a-secret-word")
    (tmp_path / "run" / "policy" / "0001" / "extra.safetensors").symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with store.local("policy/0001") as policy:
        release.write_model(run, policy, tmp_path / "out", False, [2])
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "extra.safetensors" not in names
    assert {file.name for file in (tmp_path / "policy").iterdir()} <= names


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_routers_correction_is_not_rounded_with_the_merged_weights(tmp_path: Path, tuning: str) -> None:
    """Biases of 8 +- .02 became 7.97, 8.0 or 8.06 in bfloat16, and the folder that left sent tokens to other experts."""
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 0}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("ernie4_5_moe", **COMMON, **experts))
    biases = {name: p for name, p in base.named_parameters() if not p.requires_grad}
    for bias in biases.values():
        bias.data.normal_(8, 0.02)
    base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    sets = [f"model.path={tmp_path / 'base'}", f"model.tuning={tuning}", "model.dtype=bfloat16", "model.lora_targets=[q_proj]"]
    whole = release.merged(tiny_run(*sets), None)
    named = dict(whole.named_parameters())
    assert len(biases) == 2
    assert all(torch.equal(named[name], bias) for name, bias in biases.items())
    assert {p.dtype for name, p in named.items() if name not in biases} == {torch.bfloat16}


def test_the_own_code_of_a_model_goes_along_with_its_whole_weights(tmp_path: Path) -> None:
    """config.json named files of Python that stayed behind, so nobody could open the folder."""
    run = tiny_run("model.tuning=full")
    made = Trainer(run, student.build(run, CPU), CPU)
    checkpoint.save_policy(made, checkpoint.gather(made), tmp_path / "policy")
    (tmp_path / "policy" / "modeling_my.py").write_text("# code")
    store = Store(str(tmp_path / "run"))
    store.publish_policy(1, tmp_path / "policy")
    (tmp_path / "out").mkdir()
    with store.local("policy/0001") as policy:
        release.write_model(run, policy, tmp_path / "out", False, [2])
    assert (tmp_path / "out" / "modeling_my.py").read_text() == "# code"
