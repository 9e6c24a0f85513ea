"""The real engine on the tiny reasoner: its numbers against transformers and peft in fp32, and what must not change them."""

import json
import logging
import multiprocessing
import os
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.inference import phase, startup, vllm_sleep
from actors.inference.engine import Engine
from pipeline import config
from pipeline.contract import Generate, Policy, Sampling, Sequence
from pipeline.errors import EngineError, ModelError, SettingError, StoreError
from pipeline.method.bounds import bounds
from pipeline.models.resolve import asset_path
from pipeline.models.warmstart import build_tokenizer
from pipeline.store.directory import Store
from pipeline.store.folders import ADAPTER, ADAPTER_CONFIG

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
SAMPLING = Sampling(temperature=1.1, top_p=0.95, top_k=20, max_new_tokens=48)
BASE = Policy(0)
PROMPTS = [build_tokenizer().encode(f"<bos>{text}\n") for text in ("7+4-3+9", "1-9-9+2", "5+5-5+5", "8-1+6-7")]
REQUESTS = [Generate(PROMPTS[i % 4], seed=100 + i) for i in range(16)]


@pytest.fixture(scope="module")
def policies(adapters):
    return [BASE, Policy(1, adapters[0]), Policy(2, adapters[1])]


def test_each_part_of_the_start_is_a_phase(engine, monkeypatch):
    """`egrsd distill` tells them: a cold start took 100 s without a word that an engine loads."""
    assert phase.now() == phase.CHECKS  # the last part of the start of the engine of these tests
    seen = []
    monkeypatch.setattr(phase, "enter", seen.append)
    monkeypatch.setattr("vllm.LLMEngine.from_engine_args", lambda _: pytest.fail("the weights are loaded", pytrace=False))
    with pytest.raises(pytest.fail.Exception, match="the weights are loaded"):
        startup.start_vllm(config.Model(), config.Pool(threads=1), str(asset_path()))
    assert seen == [phase.IMPORTS, phase.WEIGHTS]


@pytest.fixture(scope="module")
def traces(engine, policies):
    return [engine.generate(REQUESTS, policy, SAMPLING) for policy in policies]


def same_traces(one, other):
    return [a.tokens.tolist() for a in one] == [b.tokens.tolist() for b in other]


def test_the_shared_engine_hides_no_card_from_what_later_tests_start(engine):
    """A Ray with GPUs, as it counts them, does not start where CUDA_VISIBLE_DEVICES is empty."""
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def test_facts_say_what_the_numbers_mean(engine):
    facts = engine.facts()
    assert (facts.entropy_method, facts.logprobs_mode, facts.dtype) == ("exact", "raw_logprobs", "float32")
    assert facts.engine.startswith("vllm ")
    assert (facts.max_model_len, facts.vocab_size) == (256, 57)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_generation_and_scoring_agree_with_a_plain_forward(engine, policies, traces, plain_forward, number):
    policy, worst = policies[number], 0.0
    sequences = [Sequence(r.prompt, t.tokens.tolist()) for r, t in zip(REQUESTS, traces[number], strict=True)]
    scores = engine.score(sequences, policy)
    for sequence, trace, score in zip(sequences, traces[number], scores, strict=True):
        logprobs, entropy = plain_forward(policy.version, sequence.prompt, sequence.response)
        assert score.tokens.tolist() == sequence.response
        assert trace.policy_version == policy.version
        assert trace.entropy_error == score.entropy_error == 0.0
        for got in (trace, score):
            assert got.tokens.dtype == np.int32
            assert got.logprobs.dtype == got.entropy.dtype == np.float32
            worst = max(worst, np.abs(got.logprobs - logprobs).max(), np.abs(got.entropy - entropy).max())
    assert worst <= 2e-5  # nats; the promise is 1e-4


def test_traces_end_with_the_models_own_end_or_at_the_cap(engine, traces):
    end = build_tokenizer().eos_token_id
    for trace in traces[0]:
        assert (trace.finish_reason == "stop") == (trace.tokens[-1] == end)
        assert end not in trace.tokens[:-1]
    short = engine.generate(REQUESTS[:4], BASE, replace(SAMPLING, max_new_tokens=3))
    assert {(len(t.tokens), t.finish_reason) for t in short} == {(3, "length")}
    assert all(s.tokens.tolist() == t.tokens[:3].tolist() for s, t in zip(short, traces[0], strict=False))


def test_a_trace_does_not_depend_on_its_batch(engine, traces):
    alone = [engine.generate([request], BASE, SAMPLING)[0] for request in REQUESTS[:4]]
    assert same_traces(alone, traces[0][:4])
    sevens = [trace for i in range(0, 16, 7) for trace in engine.generate(REQUESTS[i : i + 7], BASE, SAMPLING)]
    assert same_traces(sevens, traces[0])
    assert not same_traces(engine.generate([replace(r, seed=r.seed + 1) for r in REQUESTS], BASE, SAMPLING), traces[0])


@pytest.mark.parametrize("number", [0, 1])
def test_rows_of_a_prompt_share_its_keys_and_values_and_keep_their_numbers(engine, policies, monkeypatch, number):
    """A block of the cache has 32 tokens. The second prompt's own second block would hold its last token, which is computed."""
    policy, cached = policies[number], []
    prompts = [(PROMPTS[0] * 8)[:40], (PROMPTS[1] * 8)[:64], PROMPTS[2]]
    requests = [Generate(prompt, seed) for prompt in prompts for seed in range(3)]
    alone = [engine.generate([request], policy, replace(SAMPLING, max_new_tokens=32))[0] for request in requests]
    sequences = [Sequence(r.prompt, t.tokens.tolist()) for r, t in zip(requests, alone, strict=True)]
    scored = [engine.score([sequence], policy)[0] for sequence in sequences]
    submit = engine.vllm.submit

    def counting(*args):
        answers = submit(*args)
        cached.append([answer.num_cached_tokens for answer in answers])
        return answers

    monkeypatch.setattr(engine.vllm, "submit", counting)
    together = engine.generate(requests, policy, replace(SAMPLING, max_new_tokens=32))
    twice = [engine.score(sequences, policy) for _ in range(2)]  # the second call reads nothing of the first
    assert cached == [[0, 32, 32, 0, 32, 32, 0, 0, 0]] * 3
    assert same_traces(together, alone)
    for one, others in ((alone, together), (scored, twice[0]), (scored, twice[1])):
        for row, other in zip(one, others, strict=True):
            np.testing.assert_allclose([row.logprobs, row.entropy], [other.logprobs, other.entropy], atol=1e-5)


def test_an_engine_that_computes_a_shared_prompt_wrong_shares_none(engine, monkeypatch, caplog):
    """The self-check sees another log-prob where the prompt came out of the cache. Without the cache it passes."""
    submit, cached = engine.vllm.submit, []

    def wrong_from_the_cache(*args):
        answers = submit(*args)
        cached.extend(answer.num_cached_tokens for answer in answers)
        for answer in answers:
            if answer.num_cached_tokens:
                answer.outputs[0].logprobs.logprobs[0] -= 0.1
        return answers

    monkeypatch.setattr(engine.vllm, "submit", wrong_from_the_cache)
    with caplog.at_level(logging.WARNING):
        other = Engine(config.Model(), config.Pool(threads=1), config.ScoreSettings(), engine.vllm)
    assert (
        "traces do not share their prompts, since this engine computes a shared one wrong: the self-check failed" in caplog.text
    )
    assert max(cached) == 32
    cached.clear()
    prompt = (PROMPTS[0] * 8)[:40]
    traces = other.generate([Generate(prompt, seed) for seed in range(2)], BASE, SAMPLING)
    other.score([Sequence(prompt, trace.tokens.tolist()) for trace in traces], BASE)
    assert cached == [0] * 4


def test_a_sequence_that_stands_twice_in_a_call_has_all_its_scores(engine):
    """Its blocks are in the cache up to its end. A hit beyond the first scored position would leave rows without numbers."""
    sequence = Sequence(PROMPTS[0], (PROMPTS[1] * 12)[:90])
    alone, (one, other) = engine.score([sequence], BASE)[0], engine.score([sequence, sequence], BASE)
    assert len(alone.logprobs) == 90
    for twin in (one, other):
        np.testing.assert_allclose(twin.logprobs, alone.logprobs, atol=1e-5)


def test_threads_and_policies_interleave_without_touching_each_other(engine, policies, traces):
    """Base and adapters in one step: vLLM's own CPU kernels answer the base's requests with an adapter here."""
    answers = {}

    def ask(number, part):
        answers[number, part] = engine.generate(REQUESTS[part * 8 : part * 8 + 8], policies[number], SAMPLING)

    threads = [threading.Thread(target=ask, args=(number, part)) for part in (0, 1) for number in (0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1, 2):
        assert same_traces(answers[number, 0] + answers[number, 1], traces[number])
    assert not same_traces(traces[0], traces[1])
    assert not same_traces(traces[1], traces[2])


def test_what_an_engine_cannot_answer_fails_alone(engine, traces):
    full = [3] * 256
    answers = engine.generate([Generate(full, 1), REQUESTS[0], Generate([], 1), Generate([1, 57], 1)], BASE, SAMPLING)
    assert [getattr(a, "cause", "answered") for a in answers] == [
        "prompt of 256 tokens leaves no room in model.max_model_len 256",
        "answered",
        "empty prompt",
        "token id 57 is outside the vocabulary of 57",
    ]
    assert same_traces([answers[1]], traces[0][:1])
    rows = [Sequence([1], []), Sequence([1], full), Sequence([1], [5, -3]), Sequence([1], full[:255])]
    scores = engine.score(rows, BASE)
    assert [getattr(s, "cause", "answered") for s in scores] == [
        "empty response",
        "prompt and response of 257 tokens exceed model.max_model_len 256",
        "token id -3 is outside the vocabulary of 57",
        "answered",
    ]
    assert len(scores[3].tokens) == 255  # a sequence that fills the window is scored to its end
    [trace] = engine.generate([Generate(full[:250], 1)], BASE, SAMPLING)
    assert len(trace.tokens) <= 6


def test_an_adapter_that_does_not_fit_is_named(engine, adapters, traces, tmp_path):
    def changed(name, **changes):
        folder = tmp_path / name
        shutil.copytree(adapters[0], folder)
        found = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps(found | changes))
        return folder

    wide = changed("wide")
    weights = {k: torch.zeros(16, 64) if "q_proj.lora_A" in k else v for k, v in load_file(wide / ADAPTER).items()}
    save_file(weights, wide / ADAPTER)
    cut = changed("cut")
    (cut / ADAPTER).write_bytes(b"torn")
    for folder, message in (
        (changed("rank", r=8), "the adapter's r is 8, the run asks for 16"),
        (changed("base", base_model_name_or_path="org/other"), "trained on 'org/other', the run's model is 'tiny-reasoner'"),
        (wide, "the adapter's layers are 64 wide, the model's 128"),
        (cut, "cannot be read"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            engine.generate(REQUESTS[:1], Policy(3, str(folder)), SAMPLING)
        assert caught.value.where == str(folder)
    with pytest.raises(StoreError, match="does not see this policy"):
        engine.generate(REQUESTS[:1], Policy(3, str(tmp_path / "nowhere")), SAMPLING)
    assert same_traces(engine.generate(REQUESTS[:2], BASE, SAMPLING), traces[0][:2])


@pytest.mark.parametrize("place", ["folder", "policy"])
def test_an_adapter_that_changed_where_it_lies_is_loaded_again(engine, adapters, traces, tmp_path, place):
    """A round is trained again: the same version, the same place, other weights."""
    store = Store(str(tmp_path))
    folder = tmp_path / "policy/0001"
    for number in (0, 1, 0):
        if place == "policy":
            store.publish_policy(1, adapters[number])
        else:
            shutil.copytree(adapters[number], folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        assert same_traces(engine.generate(REQUESTS[:4], Policy(1, str(folder)), SAMPLING), traces[number + 1][:4])


def sharing(engine, **score):
    """A second engine over the vLLM of the first, with its own self-check."""
    return Engine(config.Model(), config.Pool(threads=1), config.ScoreSettings(**score), engine.vllm)


def test_without_the_hook_bounds_take_over_aloud(engine, traces, monkeypatch, caplog):
    """The hook taken out under a running engine: the self-check must see it, and the bounds must hold the exact value."""
    from vllm.v1.sample.sampler import Sampler

    monkeypatch.setattr(Sampler, "gather_logprobs", staticmethod(Sampler.gather_logprobs.__wrapped__))
    with caplog.at_level(logging.WARNING):
        twin = sharing(engine, top_k=20)
    assert "entropies are bounds and not exact (generation differs from the full distribution by" in caplog.text
    assert (twin.facts().entropy_method, twin.facts().scoring) == ("bounds", "prompt")
    assert twin.facts().fallback.startswith("generation differs from the full distribution by")
    with pytest.raises(EngineError, match=r"exact entropies are not available from vllm .*score\.fallback=true"):
        sharing(engine, top_k=20, fallback=False)
    answers = twin.generate(REQUESTS, BASE, SAMPLING)
    assert same_traces(answers, traces[0])
    scores = twin.score([Sequence(r.prompt, t.tokens.tolist()) for r, t in zip(REQUESTS, answers, strict=True)], BASE)
    for known, trace, score in zip(traces[0], answers, scores, strict=True):
        for got in (trace, score):
            assert 0 < got.entropy_error < 0.5
            assert (np.abs(got.entropy - known.entropy) <= got.entropy_error + 1e-5).all()
            np.testing.assert_allclose(got.logprobs, known.logprobs, atol=1e-5)


@pytest.mark.parametrize(("columns", "said"), [(1, "two generations"), (None, "generation and scoring")])
def test_an_engine_whose_log_probs_depend_on_how_it_is_asked_does_not_start(engine, monkeypatch, columns, said):
    """Log-probs of a narrow request, or of all generations, are moved by half a nat under a running engine."""
    from vllm.v1.sample.sampler import Sampler

    known, rows = Sampler.gather_logprobs, []

    def moved(logprobs, num_logprobs, token_ids):
        found = known(logprobs, num_logprobs, token_ids)
        rows.append(len(logprobs))
        narrow = num_logprobs == 1 if columns else len(logprobs) == 1
        return found._replace(logprobs=found.logprobs + torch.eye(1, found.logprobs.shape[1]) * 0.5) if narrow else found

    monkeypatch.setattr(Sampler, "gather_logprobs", staticmethod(moved))
    with pytest.raises(EngineError, match=rf"self-check failed: {said} give the same tokens log-probs that differ by 0\.5 nat"):
        sharing(engine)


def test_bounds_on_request_are_not_spoilt_by_a_hook_that_is_there(engine, traces):
    twin = sharing(engine, entropy="bounds", top_k=5, fallback=False)
    assert (twin.facts().entropy_method, twin.facts().fallback) == ("bounds", "")
    assert engine.facts().entropy_method == "exact"
    for known, got in zip(traces[0], twin.generate(REQUESTS, BASE, SAMPLING), strict=True):
        assert (np.abs(got.entropy - known.entropy) <= got.entropy_error + 1e-5).all()


@pytest.mark.parametrize("number", [0, 1])
def test_kept_tokens_are_those_of_a_plain_forward(engine, policies, traces, plain_table, number):
    sequences = [Sequence(r.prompt, t.tokens.tolist()) for r, t in zip(REQUESTS[:6], traces[number], strict=False)]
    plain = engine.score(sequences, policies[number])
    for keep, same in ((32, {}), (57, {}), (5, {"entropy": "bounds", "top_k": 3})):
        twin = sharing(engine, keep_topk=keep, **same)
        for sequence, score, before in zip(sequences, twin.score(sequences, policies[number]), plain, strict=True):
            table = plain_table(number, sequence.prompt, sequence.response)
            expected = np.argsort(-table, axis=1)
            values = np.take_along_axis(table, expected, 1)
            sure = np.diff(values, axis=1, prepend=np.inf, append=-np.inf) < -2e-4  # no neighbour is as likely
            sure = (sure[:, :-1] & sure[:, 1:])[:, :keep]
            assert score.topk_tokens.dtype == np.int32
            assert score.topk_logprobs.dtype == np.float32
            assert (score.topk_tokens == expected[:, :keep])[sure].all()
            assert sure.mean() > 0.9
            np.testing.assert_allclose(score.topk_logprobs, values[:, :keep], atol=1e-4)
            np.testing.assert_allclose(score.logprobs, before.logprobs, atol=1e-6)
            assert (np.abs(score.entropy - before.entropy) <= score.entropy_error + 1e-5).all()
            assert (score.entropy_error == 0) == (not same)
    assert plain[0].topk_tokens is plain[0].topk_logprobs is None


def test_kept_tokens_that_an_engine_cannot_give_are_refused_with_the_setting(engine, monkeypatch):
    with pytest.raises(SettingError, match=r"score\.keep_topk: 58 is more than the 57 tokens of the teacher's vocabulary"):
        sharing(engine, keep_topk=58)
    from vllm import SamplingParams

    validate = SamplingParams._validate_logprobs

    def capped(params, model_config):
        """vLLM's own check, with the cap of a server that was started with `--max-logprobs 20`."""
        return validate(params, SimpleNamespace(max_logprobs=20, get_vocab_size=model_config.get_vocab_size))

    monkeypatch.setattr(SamplingParams, "_validate_logprobs", capped)
    said = r"score\.keep_topk: vllm \S+ does not give the 30 most likely tokens of a position \(.* max allowed: 20.*\)\. Lower it"
    with pytest.raises(EngineError, match=said):
        sharing(engine, keep_topk=30, entropy="bounds")


def test_bounds_hold_the_exact_entropy():
    logprobs = torch.randn(50, 57).mul(3).log_softmax(-1)
    lower, upper = bounds(logprobs.topk(20).values.numpy(), 57)
    entropy = torch.special.entr(logprobs.exp()).sum(-1).numpy()
    assert ((lower - 1e-6 <= entropy) & (entropy <= upper + 1e-6)).all()


def started(**changes):
    return Engine(config.Model(**changes), config.Pool(), config.ScoreSettings())


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match="no such folder") as caught:
        started(path=str(tmp_path / "none"))
    assert caught.value.where == str(tmp_path / "none")
    with pytest.raises(ModelError, match="no model here"):
        started(path=str(tmp_path))
    with pytest.raises(ModelError, match=r"the model's window is 256 tokens\. Lower model.max_model_len 512"):
        started(max_model_len=512)


def test_settings_that_cannot_work_here_are_named():
    with pytest.raises(ValueError, match=r"tensor_parallel 2 needs placement\.gpus 2, one for each process; it is 0"):
        config.Pool(tensor_parallel=2)


def no_cache(available, needed):
    """The error of vLLM's own check of the cache, as vLLM words it."""
    from vllm.v1.core.kv_cache_utils import _check_enough_kv_cache_memory

    with pytest.raises(ValueError, match="gpu_memory_utilization") as said:
        _check_enough_kv_cache_memory(available, lambda: needed, 129, lambda _: 64)
    return said.value


CARD = config.Pool(placement=config.Placement(gpus=1))


def test_a_start_that_fails_is_one_clear_line():
    error = startup.start_error(no_cache(0, 1), "some/model", CARD)
    assert isinstance(error, EngineError)
    assert str(error).startswith("some/model: vLLM did not start (ValueError: No available memory for the cache blocks. Try")
    assert "\n" not in str(error)
    assert startup.start_error(error, "elsewhere") is error


@pytest.mark.parametrize("available", [0, 2**30])
def test_a_share_of_the_card_that_leaves_no_room_for_the_cache_is_to_be_raised(available):
    """It was to be lowered, which makes it worse, or nothing was said."""
    for pool, more in ((CARD, " or tensor_parallel"), (CARD.model_copy(update={"colocate": True}), "")):
        remedy = startup.memory_remedy(no_cache(available, 2**31), pool)
        assert remedy.startswith(f"Raise memory_share{more}, or lower max_batched_tokens or model.max_model_len")
    assert "Set these engines' kv_cache_gib (1)" in startup.memory_remedy(no_cache(available, 2**31), config.Pool())


def test_a_card_that_is_too_small_or_taken_asks_for_less_or_for_more_cards():
    from vllm.v1.executor.multiproc_executor import WorkerProc
    from vllm.v1.worker.utils import request_memory

    full = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    lower = "Lower memory_share, max_num_seqs, max_batched_tokens or model.max_model_len, or raise tensor_parallel"
    assert startup.memory_remedy(full, CARD).startswith(lower)
    taken = SimpleNamespace(total_memory=2**36, free_memory=2**30, device_="cuda:0")
    with pytest.raises(ValueError, match="is less than desired GPU memory utilization") as said:
        request_memory(taken, SimpleNamespace(gpu_memory_utilization=0.9))
    assert startup.memory_remedy(said.value, CARD).startswith(lower)
    ready, child = multiprocessing.Pipe()
    child.send({"status": "FAILED"})
    with pytest.raises(Exception, match="WorkerProc initialization failed") as said:
        WorkerProc.wait_for_ready([SimpleNamespace(ready_pipe=ready, rank=0)])
    told = startup.memory_remedy(said.value, CARD)
    assert told.startswith("The log has the cause in that process. If it is memory: lower memory_share")
    assert startup.memory_remedy(ValueError("unknown kv cache dtype"), CARD) == ""


def test_a_cpu_engine_looks_at_the_class_of_its_model_in_its_own_process(engine):
    """By itself vLLM asks a process that imports vLLM once more, for each class that a machine has not met."""
    from vllm.model_executor.models import registry

    assert registry._run_in_subprocess(os.getpid) == os.getpid()


def test_gpu_engines_may_split_prompts_and_cpu_engines_may_not():
    model, pool = config.Model(max_model_len=20_000), config.Pool(max_batched_tokens=2048)
    cpu, gpu = (startup.engine_args(model, pool, "m", on_gpu, on_gpu) for on_gpu in (False, True))
    assert (cpu["enable_chunked_prefill"], cpu["max_num_batched_tokens"]) == (False, 20_001)
    assert (gpu["enable_chunked_prefill"], gpu["max_num_batched_tokens"]) == (True, 2048)


def test_the_head_of_a_model_in_half_precision_computes_in_float32():
    overrides = [
        startup.engine_args(config.Model(dtype=dtype), config.Pool(), "m", False, False)["hf_overrides"]
        for dtype in ("float32", "bfloat16", "float16")
    ]
    assert overrides == [{}, {"head_dtype": "float32"}, {"head_dtype": "float32"}]


def test_an_engine_on_a_cpu_cannot_sleep_and_says_so(engine, traces):
    assert engine.sleep() is False
    assert same_traces(engine.generate(REQUESTS[:2], BASE, SAMPLING), traces[0][:2])


def test_an_engine_that_slept_answers_as_before_and_nothing_meanwhile(engine, policies, traces, monkeypatch):
    """vLLM's own calls: on a CPU they stop and start its scheduler, and only the memory stays where it is."""
    engine.vllm.alone(lambda vllm: monkeypatch.setattr(vllm.model_config, "enable_sleep_mode", True))
    assert engine.sleep() is True
    with pytest.raises(EngineError, match="the engine sleeps"):
        engine.generate(REQUESTS[:2], BASE, SAMPLING)
    with pytest.raises(EngineError, match="the engine sleeps"):
        engine.score([Sequence([1], [5])], BASE)
    engine.wake()
    for number in (0, 1):
        assert same_traces(engine.generate(REQUESTS, policies[number], SAMPLING), traces[number])


def test_the_mode_is_asked_for_where_vllm_has_it_and_the_card_is_shared():
    assert vllm_sleep.available() is False
    from vllm.engine.arg_utils import EngineArgs

    assert EngineArgs.enable_sleep_mode is False  # the name of vLLM's setting


def test_an_engine_without_memory_names_its_share_of_the_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * 2**30, 24 * 2**30))
    pool = config.Pool(colocate=True, memory_share=0.7, placement=config.Placement(gpus=1))
    error = startup.start_error(RuntimeError("CUDA Error: out of memory at cumem"), "m", pool, "wake up")
    assert str(error) == (
        "m: vLLM did not wake up (RuntimeError: CUDA Error: out of memory at cumem). Lower memory_share, max_num_seqs, "
        "max_batched_tokens or model.max_model_len, or set train.offload all: memory_share 0.7 x 24.00 = 16.80 GiB, and 10.00 "
        "are free"
    )
