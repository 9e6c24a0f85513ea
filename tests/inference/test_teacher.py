"""The engine of another model: its numbers are over the ids of its tokenizer, whatever its vocabulary is padded to."""

import json
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.engine
def test_padded_ids_have_no_part_in_the_numbers_of_a_teacher(vllm_forks, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.models.resolve import asset_path
    from pipeline.models.tokenizers.tokenizer import tokenizer_of
    from pipeline.recipes import demo

    model = AutoModelForCausalLM.from_pretrained(asset_path(), dtype=torch.float32)
    model.resize_token_embeddings(64, mean_resizing=False)
    model.get_input_embeddings().weight.data[57:] = 2 * model.get_input_embeddings().weight.data[8]  # padding with much mass
    model.save_pretrained(tmp_path)
    tokenizer_of(demo().model).save_pretrained(tmp_path)
    done = vllm_forks.script(Path(__file__).with_name("padded_engine.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["vocab_size"], told["entropy_method"], told["fallback"]) == (57, "exact", "")
    assert np.abs(np.array(told["shared"]) - [told["logprobs"], told["entropy"]]).max() < 1e-4
    assert np.abs(np.array(told["padded"]) - [told["logprobs"], told["entropy"]]).max() > 0.05
