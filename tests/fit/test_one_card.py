"""The arithmetic of a card that engine and trainer share, by hand, for the shape of Qwen3-1.7B."""

import json
from dataclasses import replace

import pytest

from pipeline import recipes
from pipeline.fit import footprint, machine, one_card
from pipeline.overrides import resolve

GIB = 2**30
QWEN3_1_7B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
HERE = machine.Facts("3.11.9", {}, 2, frozenset(), *[64 * GIB] * 3, (), {})
WEIGHTS = 2 * 1_720_574_976
ADAPTER = 64 * 28 * (2 * (2048 + 2048) + 2 * (2048 + 1024) + 3 * (2048 + 6144))  # numbers: q, o; k, v; the three of the MLP
STEP = WEIGHTS + 16 * ADAPTER + 6 * 1024 * 151936 + 16_384 * 2 * (28 * 2048 + ADAPTER // 64 // 28)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "config.json").write_text(json.dumps(QWEN3_1_7B))
    return resolve(recipes.recipe("qwen3_1_7b_1gpu"), [f"model.path={folder}"])


@pytest.fixture(scope="module")
def size(run):
    return footprint.measure(run.model)


@pytest.mark.parametrize(
    ("offload", "kept"), [("none", WEIGHTS + 12 * ADAPTER), ("optimizer", WEIGHTS + 4 * ADAPTER), ("all", 0)]
)
def test_what_the_trainer_keeps_while_the_engine_answers(run, size, offload, kept):
    """The adapter takes 4 bytes a number, the two moments of AdamW 8. CUDA itself takes half a GiB."""
    assert one_card.at_rest(resolve(run, [f"train.offload={offload}"]), size) == kept + GIB // 2


def test_every_common_card_is_shown_with_both_turns(run, size):
    lines = one_card.judge(run, size, HERE)
    assert [line.topic for line in lines] == ["one card"] * 3
    assert sum(footprint.rank_bytes(run, size).values()) == STEP
    rest = WEIGHTS + 4 * ADAPTER + GIB / 2
    for line, card in zip(lines, (24, 48, 80), strict=True):
        traces = int((0.7 * card * GIB - WEIGHTS) // (114_688 * 16_384))
        logits = 1024 * 151936 * 4
        answering, step = 0.7 * card + (logits + rest) / GIB, (STEP + GIB / 2) / GIB
        engine = f"0.7 x {card}.00 = {0.7 * card:.2f} (weights 3.20, cache for {traces} traces of 16384 tokens)"
        assert line.text == (
            f"{card}.00 GiB: while the engine answers, {engine} + scoring logits 0.58 + trainer at rest {rest / GIB:.2f} = "
            f"{answering:.2f}; while the trainer steps, {step:.2f} + sleeping engine 1.50 (assumed) = {step + 1.5:.2f}: fits"
        )
    assert [line.text.split(" traces")[0].split()[-1] for line in lines] == ["7", "17", "30"]


def test_the_card_of_this_machine_is_judged_with_what_to_lower(run, size):
    def here(gib, *sets):
        return one_card.judge(resolve(run, list(sets)), size, replace(HERE, gpus=(gib * GIB,)))[-1]

    assert (here(24).level, here(24).topic) == ("ok", "one card, here")
    small = here(12)
    assert small.level == "error"
    assert small.text.endswith(
        "too small. Lower engines.rollout.memory_share (now 0.7) for the engine's turn, set train.offload all (now optimizer); "
        "lower train.micro_batch_tokens (now 16384), train.head_chunk_tokens or model.max_model_len for the trainer's"
    )
    assert here(12, "train.offload=all").level == "ok"
    assert here(24, "engines.rollout.memory_share=0.95").level == "error"
    assert here(24, "train.micro_batch_tokens=100000").level == "error"


def test_runs_that_share_no_card_have_no_such_line(size):
    for run in (recipes.demo(), recipes.recipe("qwen3_4b_8gpu"), resolve(recipes.demo(), ["engines.rollout.colocate=true"])):
        assert one_card.judge(run, size, HERE) == []
