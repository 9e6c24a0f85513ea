"""Log-probs of prompts leave vLLM as arrays where this project asked for them, and as vLLM makes them elsewhere."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actors.inference import vllm_scoring
from actors.inference.hooks import prompt_logprobs


@pytest.fixture
def processor(shipped):
    """vLLM's class that takes log-probs, as it ships."""
    return shipped("vllm.v1.engine.logprobs:LogprobsProcessor", "_update_prompt_logprobs")


def taken(kind, flat):
    """What vLLM hands out for a prompt of five tokens with three numbers each."""
    from vllm.logprobs import create_prompt_logprobs
    from vllm.v1.outputs import LogprobsTensors

    one = kind(None, None, create_prompt_logprobs(flat), None, None, 2)
    ids, values = torch.arange(12, dtype=torch.int32).reshape(4, 3), -torch.arange(12.0).reshape(4, 3)
    one._update_prompt_logprobs(LogprobsTensors(ids, values, torch.zeros(4, dtype=torch.int64)))
    return one.pop_prompt_logprobs()


def test_arrays_are_read_like_lists(processor, hooked):
    plain = taken(processor, flat=True)
    arrays = taken(hooked(processor, "_update_prompt_logprobs", prompt_logprobs.install), flat=True)
    assert isinstance(arrays, prompt_logprobs.Arrays)
    answers = [
        SimpleNamespace(
            prompt_token_id_logprobs=None, prompt_logprobs=found, prompt_token_ids=[9, 0, 3, 6, 9], num_cached_tokens=None
        )
        for found in (plain, arrays)
    ]
    lists, read = (vllm_scoring.read(answer, 2, 1) for answer in answers)
    assert read.tokens.tolist() == [6, 9]
    assert read.table.tolist() == [[-6, -7, -8], [-9, -10, -11]]
    assert read.kept.tolist() == [[7], [10]]
    for one, other in zip(lists, read, strict=True):
        assert np.array_equal(one, other)


def test_other_requests_of_the_process_get_lists(processor):
    plain = taken(processor, flat=False)
    prompt_logprobs.install()
    assert taken(processor, flat=False) == plain
    assert plain[0] is None


WIDTH, VOCAB, KEPT = 8, 11, 2


def runner(prompts: dict[str, list[int]], firsts: dict[str, int | None], rows: list[int]):
    """As much of vLLM's V1 runner as its function for prompt log-probs reads, with a random head. It notes its rows in `rows`."""
    weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))

    def compute_logits(hidden):
        rows.append(len(hidden))
        return hidden @ weight.T

    from vllm.v1.sample.sampler import Sampler

    gather = getattr(Sampler.gather_logprobs, "__wrapped__", Sampler.gather_logprobs)
    requests = {
        name: SimpleNamespace(
            prompt_token_ids=ids,
            num_computed_tokens=0,
            in_progress_prompt_logprobs_cpu=None,
            sampling_params=SimpleNamespace(extra_args=None if firsts[name] is None else {prompt_logprobs.FIRST: firsts[name]}),
        )
        for name, ids in prompts.items()
    }
    return SimpleNamespace(
        num_prompt_logprobs=dict.fromkeys(prompts, KEPT),
        requests=requests,
        device=torch.device("cpu"),
        input_batch=SimpleNamespace(req_id_to_index={name: place for place, name in enumerate(prompts)}),
        query_start_loc=SimpleNamespace(np=None),
        model=SimpleNamespace(compute_logits=compute_logits),
        model_config=SimpleNamespace(logprobs_mode="raw_logprobs"),
        sampler=SimpleNamespace(compute_logprobs=Sampler.compute_logprobs, gather_logprobs=gather),
        _sync_device=lambda: None,
    )


def answered(prompts, firsts, steps, skip):
    """Log-probs of all prompts by vLLM's own function, with the change or without, and the rows that went through the head.

    steps: tokens of each prompt that one step computes, in turn.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    plain = GPUModelRunner._get_prompt_logprobs_dict
    plain = getattr(plain, "__wrapped__", plain)
    rows: list[int] = []
    one, found = runner(prompts, firsts, rows), {}
    hidden = {
        name: torch.randn(len(ids), WIDTH, generator=torch.Generator().manual_seed(len(ids))) for name, ids in prompts.items()
    }
    for step in steps:
        one.query_start_loc.np = np.cumsum([0, *step.values()])
        parts = [hidden[name][one.requests[name].num_computed_tokens :][:count] for name, count in step.items()]
        function = prompt_logprobs.from_first(plain) if skip else plain
        before = one.query_start_loc.np.copy()
        found |= function(one, torch.cat(parts), step)
        assert np.array_equal(one.query_start_loc.np, before)
        for name, count in step.items():
            one.requests[name].num_computed_tokens += count
    return found, rows


PROMPTS = {"a": [1, 5, 2, 7, 3, 4, 9], "b": [2, 2, 6, 1, 8], "c": [4, 3, 2]}
WHOLE = [{name: len(ids) for name, ids in PROMPTS.items()}]
CHUNKS = [{"a": 2, "b": 3, "c": 1}, {"a": 3, "b": 2, "c": 2}, {"a": 2, "b": 0, "c": 0}]


@pytest.mark.parametrize("steps", [WHOLE, CHUNKS], ids=["whole", "in chunks"])
@pytest.mark.parametrize("firsts", [{"a": 4, "b": 2, "c": None}, {"a": 0, "b": 3, "c": 1}])
def test_only_wanted_positions_go_through_the_head_and_have_the_same_numbers(steps, firsts):
    expected, every = answered(PROMPTS, firsts, steps, skip=False)
    found, fewer = answered(PROMPTS, firsts, steps, skip=True)
    assert sum(every) == sum(len(ids) - 1 for ids in PROMPTS.values())
    assert sum(fewer) == sum(len(ids) - 1 - (firsts[name] or 0) for name, ids in PROMPTS.items())
    for name, first in firsts.items():
        for one, other in zip(expected[name][:3], found[name][:3], strict=True):
            torch.testing.assert_close(one[first or 0 :], other[first or 0 :])


@pytest.mark.parametrize(("numbers", "cached"), [(22, 0), (3, 0), (43, 40)])
def test_an_answer_without_all_its_rows_has_no_scores(numbers, cached):
    """Of 44 tokens with a response of 4: rows that a runner left out, too few to be a row each, rows out of the cache."""
    flat = prompt_logprobs.Arrays(np.zeros(numbers, np.int32), np.zeros(numbers, np.float32))
    answer = SimpleNamespace(
        prompt_token_id_logprobs=None, prompt_logprobs=flat, prompt_token_ids=[7] * 44, num_cached_tokens=cached
    )
    assert vllm_scoring.read(answer, 4) is None
    whole = flat._replace(token_ids=np.zeros(43, np.int32), logprobs=np.zeros(43, np.float32))
    assert (
        vllm_scoring.read(SimpleNamespace(**{**vars(answer), "prompt_logprobs": whole, "num_cached_tokens": 32}), 4) is not None
    )
