"""Log-probs of prompts leave vLLM as arrays where this project asked for them, and as vLLM makes them elsewhere."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actors.inference import prompt_arrays, vllm_scoring


@pytest.fixture
def processor(monkeypatch):
    """vLLM's class that takes log-probs, as it ships and with the change."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    found = LogprobsProcessor._update_prompt_logprobs
    monkeypatch.setattr(LogprobsProcessor, "_update_prompt_logprobs", getattr(found, "__wrapped__", found))
    return LogprobsProcessor


def taken(kind, flat):
    """What vLLM hands out for a prompt of five tokens with three numbers each."""
    from vllm.logprobs import create_prompt_logprobs
    from vllm.v1.outputs import LogprobsTensors

    one = kind(None, None, create_prompt_logprobs(flat), None, None, 2)
    ids, values = torch.arange(12, dtype=torch.int32).reshape(4, 3), -torch.arange(12.0).reshape(4, 3)
    one._update_prompt_logprobs(LogprobsTensors(ids, values, torch.zeros(4, dtype=torch.int64)))
    return one.pop_prompt_logprobs()


def test_arrays_are_read_like_lists(processor):
    plain = taken(processor, flat=True)
    assert prompt_arrays.install() is True
    changed = processor._update_prompt_logprobs
    assert prompt_arrays.install() is True
    assert processor._update_prompt_logprobs is changed, "installing twice must not wrap twice"
    arrays = taken(processor, flat=True)
    assert isinstance(arrays, prompt_arrays.Arrays)
    answers = [
        SimpleNamespace(prompt_token_id_logprobs=None, prompt_logprobs=found, prompt_token_ids=[9, 0, 3, 6, 9])
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
    prompt_arrays.install()
    assert taken(processor, flat=False) == plain
    assert plain[0] is None
