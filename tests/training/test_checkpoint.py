"""Saved state goes on exactly where it stood, loads in peft, and is refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_rounds import make_round, tiny_run

from pipeline.config import Run
from pipeline.errors import ModelError, TrainingError
from pipeline.models.resolve import resolve_model
from pipeline.store import folders
from pipeline.training import checkpoint
from pipeline.training.step import Trainer
from pipeline.training.student import student

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    made = Trainer(tiny_run(), student.build(tiny_run(), CPU), CPU)
    list(made.train_round(make_round(0)))
    checkpoint.save(made, 1, checkpoint.gather(made), folder)
    return folder


def resumed(folder: Path, run: Run) -> tuple[Trainer, int]:
    model = student.build(run, CPU)
    checkpoint.load_adapter(model, folder, run.model)
    made = Trainer(run, model, CPU)
    return made, checkpoint.load_optimizer(made, folder)


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    made = Trainer(tiny_run(), student.build(tiny_run(), CPU), CPU)
    name, weight = next(iter(made.parameters().items()))
    weight.data.view(-1)[3] = float("nan")
    with pytest.raises(TrainingError, match=r"step 0: 1 of \d+ trained tensors are not finite") as caught:
        checkpoint.save(made, 1, checkpoint.gather(made), tmp_path / "state")
    assert name in str(caught.value)
    assert not (tmp_path / "state").exists()


def test_resumed_training_ends_in_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    run = tiny_run("model.lora_dropout=0.1", "train.warmup_steps=3", "train.weight_decay=0.01")
    whole = Trainer(run, student.build(run, CPU), CPU)
    for number in (0, 1):
        list(whole.train_round(make_round(number)))
        checkpoint.save(whole, number + 1, checkpoint.gather(whole), tmp_path / str(number + 1))
    for number in (2, 3):
        list(whole.train_round(make_round(number)))
    part, number = resumed(tmp_path / "2", run)
    assert (number, part.step) == (2, 4)
    for number in (2, 3):
        list(part.train_round(make_round(number)))
    for end, made in (("whole", whole), ("part", part)):
        checkpoint.save(made, 4, checkpoint.gather(made), tmp_path / end)
    for name in (checkpoint.ADAPTER, folders.ADAPTER_CONFIG, checkpoint.OPTIMIZER, checkpoint.CURSOR):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "part" / name).read_bytes(), name


def test_a_state_that_has_made_no_step_can_be_gone_on_from(tmp_path: Path) -> None:
    made = Trainer(tiny_run(), student.build(tiny_run(), CPU), CPU)
    checkpoint.save(made, 1, checkpoint.gather(made), tmp_path)
    made, number = resumed(tmp_path, tiny_run())
    assert (number, made.step) == (1, 0)


def test_the_state_is_safetensors_and_json(saved: Path) -> None:
    assert {file.suffix for file in saved.iterdir()} == {".safetensors", ".json"}


def test_peft_loads_the_adapter_and_answers_alike(saved: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(resolve_model("tiny-reasoner"), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, saved)
    tokens = torch.arange(4, 20)[None]
    ours = resumed(saved, tiny_run())[0].student.model.eval()
    with torch.no_grad(), loaded.disable_adapter():
        plain = loaded(input_ids=tokens).logits
    with torch.no_grad():
        adapted = loaded(input_ids=tokens).logits
        assert torch.equal(adapted, ours(input_ids=tokens).logits)
    assert not torch.allclose(adapted, plain)


def test_the_adapter_names_its_base_as_configured(saved: Path) -> None:
    assert json.loads((saved / folders.ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == "tiny-reasoner"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.lora_rank=8", "r is 4, the run asks for 8"),
        ("model.lora_alpha=7", "lora_alpha is 32.0, the run asks for 7"),
        ("model.lora_targets=[q_proj]", "target_modules is"),
        ("model.path=elsewhere", "trained on 'tiny-reasoner', the run's model is 'elsewhere'"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(saved: Path, setting: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        checkpoint.load_adapter(student.build(tiny_run(), CPU), saved, tiny_run(setting).model)


def test_a_state_of_another_seed_or_with_a_hole_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="made with seed 3, this run has 4"):
        resumed(saved, tiny_run("seed=4"))
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(saved / checkpoint.OPTIMIZER)
    lost = sorted(tensors)[5]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / checkpoint.OPTIMIZER)
    with pytest.raises(TrainingError, match=f"lacks '{lost}'"):
        resumed(tmp_path, tiny_run())
