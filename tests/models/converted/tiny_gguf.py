"""Tiny GGUF files as llama.cpp lays them out: the lines that every family of models shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf")


@contextmanager
def written(path: Path, family: str, config: Any, special: list[str], letters: list[str]) -> Iterator[Any]:
    """A writer with the sizes in `config` and the tokens. What is given to it stands in the file once the block ends."""
    w = gguf.GGUFWriter(path, family)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_vocab_size(config.vocab_size)
    w.add_token_list(special + letters)
    w.add_token_types([3] * len(special) + [1] * len(letters))
    yield w
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def weights(model: Any, family: Any) -> Iterator[tuple[str, str, Any]]:
    """Of each weight its name in a GGUF file, its name in transformers, and its tensor. The tied head is left out."""
    names = gguf.get_tensor_name_map(family, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            yield names.get_name(name, try_suffixes=(".weight",)), name, tensor
