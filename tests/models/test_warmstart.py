"""The script still makes a model as good: its first steps repeat the record, and the shipped weights score what it says."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

from pipeline.models import warmstart
from pipeline.models.resolve import asset_path
from pipeline.models.warmstart import build_tokenizer
from pipeline.problems import tiny, worlds

STEPS = 40


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((asset_path() / warmstart.RECORD).read_text())


@pytest.fixture(scope="module")
def shipped() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(asset_path(), dtype=torch.float32)


@pytest.mark.chaos
def test_the_script_repeats_the_recorded_training(record: dict) -> None:
    losses = warmstart.train(warmstart.build_model(record["seed"]), record["steps"], record["seed"], stop=STEPS)
    expected = record["losses"][:STEPS]
    assert losses[0] == pytest.approx(expected[0], abs=1e-3)  # same weights, same first batch
    assert losses == pytest.approx(expected, abs=0.1)  # other hardware rounds otherwise, and rounding grows
    assert sum(losses[-10:]) == pytest.approx(sum(expected[-10:]), rel=0.03)
    assert losses[-1] < 0.35 * losses[0]


def test_the_record_is_of_a_whole_training(record: dict) -> None:
    losses = record["losses"]
    assert len(losses) == record["steps"]
    assert sum(losses[-50:]) / 50 < 0.14


@pytest.mark.parametrize("aided", [False, True])
def test_the_shipped_weights_score_what_is_recorded(record: dict, shipped: torch.nn.Module, aided: bool) -> None:
    stated = record["aided" if aided else "unaided"]
    found = warmstart.evaluate(shipped, 512, aided, seed=1)
    assert found.accuracy == pytest.approx(stated["accuracy"], abs=0.08)  # 3.6 standard errors of 512 and 1024 draws
    assert found.mean_length == pytest.approx(stated["mean_length"], abs=2.5)


def test_the_student_has_room_and_the_teacher_an_edge(record: dict) -> None:
    assert 0.3 < record["unaided"]["accuracy"] < 0.6
    assert record["aided"]["accuracy"] > record["unaided"]["accuracy"] + 0.25


def test_the_shipped_folder_is_small_and_rounded_to_bf16(shipped: torch.nn.Module) -> None:
    assert sum(p.stat().st_size for p in asset_path().iterdir()) <= 2 * 2**20
    assert all(torch.equal(p, p.bfloat16().float()) for p in shipped.parameters())


def test_a_batch_learns_everything_after_the_problem() -> None:
    tokenizer = build_tokenizer()
    ids, labels = warmstart.training_batch(tokenizer, random.Random(3), 16)
    assert ids.shape == labels.shape
    for row, wanted in zip(ids, labels, strict=True):
        given, learned = tokenizer.decode(row[wanted == -100]), tokenizer.decode(row[wanted != -100])
        problem = given.replace("<pad>", "").removeprefix("<bos>")
        assert tiny.reference_solution(problem)  # nothing but the problem is given
        assert learned[0] in "|\n"
        assert learned.endswith("<eos>")
        assert torch.equal(row[wanted != -100], wanted[wanted != -100])
        assert not learned.startswith("|") or learned.startswith(f"|{tiny.reference_solution(problem)}\n")


def test_a_made_folder_loads_as_it_was_evaluated(tmp_path: Path) -> None:
    written = warmstart.make(tmp_path, steps=1, seed=5, num_problems=4)
    assert json.loads((tmp_path / warmstart.RECORD).read_text()) == written
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.config.head_dim == 32
    assert model.generation_config.eos_token_id == build_tokenizer().eos_token_id


def test_the_reasoner_of_a_world_learns_traces_of_that_world(tmp_path: Path) -> None:
    """No token of a trace is strange to its world, and problem and solution are those of the world."""
    world = worlds.World(forks=2, pivots=1, filler=3, style=0.5)
    kind = replace(warmstart.STUDENT, world=world)
    tokenizer, seen = build_tokenizer(), set()
    ids, labels = warmstart.training_batch(tokenizer, random.Random(3), 24, kind)
    for row, wanted in zip(ids, labels, strict=True):
        problem = tokenizer.decode(row[wanted == -100]).replace("<pad>", "").removeprefix("<bos>")
        learned = tokenizer.decode(row[wanted != -100]).removesuffix("<eos>")
        solution, _, response = learned.partition("\n")
        seen.add(bool(solution))
        classes = {worlds.CLASSES[code] for code in worlds.token_classes(problem, response, world)}
        assert "other" not in classes, response
        assert {"filler", "fork", "pivot", "choice"} <= classes
        assert re.search(worlds.ANSWER_PATTERN, response)
    assert seen == {True, False}  # with and without the reference
    made = warmstart.make(tmp_path, steps=1, seed=0, num_problems=2, kind=kind)
    assert made["aided"]["num_problems"] == 2
    with pytest.raises(typer.BadParameter, match="forkz"):
        warmstart.main(tmp_path / "no", threads=1, world="forkz=2")
    assert not (tmp_path / "no").exists()


def test_a_teacher_is_a_larger_model_of_the_same_vocabulary_on_careful_traces():
    teacher, student = (warmstart.build_model(0, kind) for kind in (warmstart.TEACHER, warmstart.STUDENT))
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (teacher, student)]
    assert sizes[0] > 3_000_000 > 1_000_000 > sizes[1]
    assert teacher.config.vocab_size == student.config.vocab_size
    losses = warmstart.train(teacher, 40, 0, stop=3, kind=warmstart.TEACHER)
    assert losses[-1] < losses[0]


def test_a_batch_in_pieces_has_the_loss_and_the_gradients_of_the_whole():
    ids, labels = warmstart.training_batch(build_tokenizer(), random.Random(4), 10)
    found = []
    for pieces in (1, 3):
        model = warmstart.build_model(1)
        loss = warmstart.gradients(model, ids, labels, pieces)
        found.append((loss, torch.cat([weight.grad.flatten() for weight in model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-4)
