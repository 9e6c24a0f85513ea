"""Estimates of speed and hours: arithmetic by hand, on a model and a card with round numbers."""

import re
from dataclasses import replace

import pytest

from pipeline import recipes
from pipeline.fit import machine, pace
from pipeline.fit.footprint import Size
from pipeline.overrides import resolve

GIB = 2**30
SIZE = Size(4_000_000_000, 0, 0, 0, 0, 50_000, 0, 0)  # 8 GB of weights, 100 kB of keys and values a token, in bf16
CARD = (1e12, 100e12)  # bytes/s, FLOP/s
FACTS = machine.Facts("3.11.9", {}, 8, frozenset(), 0, 0, 0, (40 * GIB,) * 2, {}, cards=("Card 1",) * 2)
SETS = [
    "model.max_model_len=2000",
    "rollout.max_new_tokens=1000",
    "rollout.prompts_per_round=64",
    "evaluation.problems=0",
    "score.rescore_share=0.25",
    "rounds=10",
]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(pace, "CARDS", {"Card 1": (1000, 100)})
    return resolve(recipes.recipe("qwen3_4b_8gpu"), SETS)


def test_a_step_reads_the_weights_and_the_traces(run):
    """8e9 + 16 x 1500 x 1e5 bytes at .6 x 1e12 bytes/s; the arithmetic of 16 traces takes less."""
    step = pace.decode(run, SIZE, CARD, 40 * GIB, (16, 1000))
    assert (step.batch, step.read) == (16, 8e9 + 2.4e9)
    assert step.seconds == pytest.approx(10.4e9 / 0.6e12)


def test_no_more_traces_than_memory_holds_stand_side_by_side(run):
    room = int((0.9 * 20 * GIB - 8e9) // (2000 * 1e5))
    assert pace.decode(run, SIZE, CARD, 20 * GIB, (64, 1000)).batch == room == 56
    assert pace.decode(run, SIZE, CARD, 80 * GIB, (500, 1000)).batch == run.engines.rollout.max_num_seqs == 64
    assert pace.decode(run, SIZE, CARD, 4 * GIB, (64, 1000)).batch == 1


def test_many_traces_are_bound_by_arithmetic(run):
    slow = (1e15, 1e12)
    assert pace.decode(run, SIZE, slow, 40 * GIB, (16, 1000)).seconds == pytest.approx(2 * 4e9 * 16 / (1e12 * 0.4))


def test_scoring_and_training_cost_2_and_6_flop_for_each_parameter(run):
    assert pace.score_rate(run.engines.rollout, SIZE, CARD) == pytest.approx(100e12 * 0.4 / 8e9)
    assert pace.train_rate(run, SIZE, CARD) == pytest.approx(100e12 * 0.35 / 24e9)
    plain = resolve(run, ["train.gradient_checkpointing=false"])
    assert pace.train_rate(plain, SIZE, CARD) == pytest.approx(100e12 * 0.35 / 16e9)


def test_the_hours_of_a_run_are_shown_with_their_parts(run):
    """Each of 4 engines writes 16 traces at once; they score 16 x 2000 x 1.25 tokens; 4 ranks train 64 x 2000 tokens."""
    rollout, scoring, training = 1000 * 10.4e9 / 0.6e12, 16 * 2000 * 1.25 / 5000, 64 * 2000 / (4 * 100e12 * 0.35 / 24e9)
    lines = {line.topic: line.text for line in pace.estimate(run, SIZE, FACTS)}
    parts = f"10 rounds x (rollout {rollout:.1f} + scoring {scoring:.1f} + training {training:.1f}) s"
    assert lines["hours"].startswith(f"{parts} + evaluations 0 s = {10 * (rollout + scoring + training) / 3600:.1f} h")
    assert (f"{rollout:.1f}", f"{scoring:.1f}", f"{training:.1f}") == ("17.3", "8.0", "21.9")
    assert lines["generation"].startswith("16 traces of up to 1000 tokens at once, 10.40 GB a step, 17.33 ms = 923 tokens/s")
    assert "Card 1: 1000 GB/s and 100 TFLOP/s" in lines["pace (estimate)"]


def test_two_evaluations_count(run):
    """800 traces over 4 engines are 4 times 64 at once and fewer: 4 passes of 100 steps, before and after."""
    longer = resolve(run, ["evaluation.problems=200", "evaluation.samples=4", "evaluation.max_new_tokens=100"])
    seconds = 2 * 4 * 100 * (8e9 + 64 * 150 * 1e5) / 0.6e12
    [hours] = [line for line in pace.estimate(longer, SIZE, FACTS) if line.topic == "hours"]
    assert f"+ evaluations {seconds:.0f} s" in hours.text


def test_turns_on_one_card_take_the_time_in_which_weights_and_moments_move(monkeypatch):
    """8 GB of weights leave the card and come back, and so do the two moments of 64 x 1e6 numbers, at 20 GB/s."""
    monkeypatch.setattr(pace, "CARDS", {"Card 1": (1000, 100)})
    size = replace(SIZE, lora_width=1_000_000)
    [hours] = [line for line in pace.estimate(recipes.recipe("qwen3_1_7b_1gpu"), size, FACTS) if line.topic == "hours"]
    assert f" + sleep and wake {2 * (8e9 + 8 * 64e6) / 20e9:.1f}) s" in hours.text


@pytest.mark.parametrize(
    ("facts", "sets", "said"),
    [
        (replace(FACTS, cards=("Card 1", "Card 2")), [], "none: the rates of Card 2 are not known here"),
        (replace(FACTS, cards=(), gpus=()), [], "none: no GPU here"),
        (FACTS, ["model.dtype=float32"], "model.dtype is float32"),
    ],
)
def test_without_known_rates_there_is_no_figure(run, facts, sets, said):
    [line] = pace.estimate(resolve(run, sets), SIZE, facts)
    assert (line.level, line.topic) == ("ok", "pace (estimate)")
    assert said in line.text


def test_a_recipe_on_a_cpu_has_what_was_measured():
    [line] = pace.estimate(recipes.demo(), SIZE, FACTS)
    assert "took 2 min 4 s on two cores" in line.text
    [line] = pace.estimate(recipes.demo().model_copy(update={"name": "mine"}), SIZE, FACTS)
    assert line.text == "none: no rates are stated for what runs on a CPU"


@pytest.mark.parametrize(
    ("sets", "load", "said"),
    [
        (["engines.rollout.threads=8"], 0.4, ""),
        (["engines.rollout.threads=8"], 2.7, "engines.rollout.threads is 8, and the load of 2.7 leaves 5 of 8 CPUs free"),
        (["engines.rollout.threads=5", "train.threads=6"], 2.7, "train.threads is 6, .*set it to 5"),
        (["engines.rollout.threads=1", "train.threads=1"], 40.0, ""),
        (["engines.rollout.threads=8", "engines.rollout.placement.gpus=1"], 2.7, ""),
    ],
)
def test_more_threads_than_free_cpus_are_told(sets, load, said, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    run, facts = resolve(recipes.demo(), sets), replace(FACTS, load=load)
    found = pace.threads(run, facts)
    assert [line.level for line in found] == ["warning"] * bool(said)
    assert not said or re.search(said, found[0].text)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert pace.threads(run, facts) == []
