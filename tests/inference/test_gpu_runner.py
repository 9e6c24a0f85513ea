"""The engine on vLLM's V2 runner, which GPUs use. It runs here through Triton's interpreter, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
ROOT = Path(__file__).parent.parent.parent
BLOCK = 32  # tokens, as in v2_engine.py


@pytest.fixture(scope="module")
def answers(adapters, tmp_path_factory):
    """What the engine answered: for each policy (base, adapter) and prompt its tokens, log-probs and entropies."""
    path = tmp_path_factory.mktemp("v2") / "answers.json"
    command = [sys.executable, str(ROOT / "tests/inference/v2_engine.py"), adapters[0], str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(path.read_text())


def gap(rows, forward, version, prompts):
    """The largest distance, in nats, of the log-probs and entropies in `rows` from those of a plain forward."""
    worst = 0.0
    for (tokens, *got), prompt in zip(rows, prompts, strict=True):
        expected = forward(version, prompt, tokens)
        worst = max(worst, *(np.abs(np.asarray(one) - other).max() for one, other in zip(got, expected, strict=True)))
    return worst


def test_the_self_check_finds_exact_entropies_and_the_short_way_to_score(answers):
    facts = answers["facts"]
    assert (facts["entropy_method"], facts["scoring"], facts["fallback"]) == ("exact", "shared", "")


def test_tritons_kernels_multiply_float32_in_float32(answers):
    """The interpreter does so anyway. A card would round to TF32, and the self-check or the trainer would end the run."""
    assert answers["float32"] == "ieee"


@pytest.mark.parametrize("version", [0, 1])
def test_base_and_adapter_in_one_batch_agree_with_a_plain_forward(answers, plain_forward, version):
    """Prefill comes in chunks, and the numbers are those at temperature 1, although the traces are drawn at 1.1."""
    assert len(answers["teacher"]) > 24
    assert gap(answers["traces"][version], plain_forward, version, answers["prompts"]) <= 1e-4
    assert gap(answers["scores"][version], plain_forward, version, [answers["teacher"]] * 3) <= 1e-4


@pytest.mark.parametrize("version", [0, 1])
def test_tokens_are_drawn_from_the_likeliest_at_the_temperature_asked_for(answers, plain_table, version):
    """top_k 20 and top_p .95 at 1.1: a token is among the 20 likeliest, and those before it have less than .95 of the mass."""
    likeliest = True
    for (tokens, *_), prompt in zip(answers["traces"][version], answers["prompts"], strict=True):
        mass = np.exp(plain_table(version, prompt, tokens) / 1.1)
        own, kept = mass[np.arange(len(tokens)), tokens][:, None], np.sort(mass, -1)[:, -20:]  # vLLM cuts by top_k first
        before = np.where(kept > own, kept, 0.0).sum(-1) / kept.sum(-1)
        assert ((mass > own).sum(-1) < 20).all()
        assert (before < 0.95).all()
        likeliest = likeliest and (before == 0).all()
    assert not likeliest  # the test would pass on a greedy engine


def test_policies_draw_other_traces_and_a_trace_does_not_depend_on_its_batch(answers):
    base, adapted = ([tokens for tokens, *_ in part] for part in answers["traces"])
    assert base != adapted
    assert [tokens for tokens, *_ in answers["alone"]] == adapted[:2]


def test_scoring_lets_only_response_positions_through_the_head_and_shares_the_prompt(answers):
    length, prompt = len(answers["scores"][0][0][0]), len(answers["teacher"])
    scored, whole = 2 * 3 * length, 2 * 3 * (prompt + length - 1)  # three sequences under two policies
    assert scored <= answers["head"] <= scored + 2 * 3 * 5  # a request also samples in each of its steps, of which it has five
    assert answers["head"] < 0.75 * whole
    assert all(cached in (0, BLOCK) for cached in answers["cached"])
    assert sum(answers["cached"]) >= 2 * 2 * BLOCK  # under each policy two of three take the prompt's block from the cache


def test_traces_of_a_prompt_share_its_keys_and_values(answers, plain_forward):
    assert answers["cached_group"] == [0, BLOCK, BLOCK]
    assert gap(answers["group"], plain_forward, 1, [answers["teacher"]] * 3) <= 1e-4


def test_a_sequence_that_is_scored_twice_is_not_cut_by_the_cache(answers):
    """Two of its blocks are in the cache. The second goes beyond the first scored position, which would drop the scores."""
    assert len(answers["teacher"]) + len(answers["again"][0][0]) > 2 * BLOCK >= len(answers["teacher"]) > BLOCK
    assert answers["cached_again"] == [0, BLOCK]
    for one in answers["again"]:
        assert one[0] == answers["scores"][0][0][0]
        np.testing.assert_allclose(one[1:], answers["scores"][0][0][1:], atol=1e-4)


@pytest.mark.parametrize(("part", "version"), [(0, 0), (1, 1), (2, 0)])
def test_kept_tokens_are_those_of_a_plain_forward(answers, plain_table, part, version):
    """By the short way to score under both policies, and by the way that lets the whole prompt through the head."""
    assert answers["keeping"] == answers["facts"]
    for row, plain in zip(answers["kept"][part], answers["scores"][version], strict=False):
        tokens, logprobs, entropy, kept, values = map(np.asarray, row)
        np.testing.assert_allclose([logprobs, entropy], plain[1:], atol=1e-4)
        table = plain_table(version, answers["teacher"], tokens.tolist())
        assert kept.shape == values.shape == (len(tokens), 32)
        assert (np.sort(kept, 1)[:, 1:] > np.sort(kept, 1)[:, :-1]).all()
        np.testing.assert_allclose(values, -np.sort(-table, axis=1)[:, :32], atol=1e-4)
        np.testing.assert_allclose(values, np.take_along_axis(table, kept, 1), atol=1e-4)


def test_both_ways_to_score_give_the_same(answers):
    for short, whole in zip(answers["scores"][0][:2], answers["whole"], strict=True):
        assert short[0] == whole[0]
        np.testing.assert_allclose(short[1:], whole[1:], atol=1e-4)
