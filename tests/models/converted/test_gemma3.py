"""A real, tiny GGUF file of Gemma 3 in four parts is joined, converted and compared; the parts must be the expected file."""

from __future__ import annotations

import hashlib
import importlib

import pytest
import torch
import typer
from tiny_gguf import gguf, weights, written
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig
from typer.testing import CliRunner

from pipeline.errors import ModelError
from pipeline.models.converted import gemma3
from pipeline.models.converted.gguf import dequantise

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
LETTERS = ["\n", "▁", *(chr(c) for c in range(33, 127))]


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(SPECIAL) + len(LETTERS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        sliding_window=32,
        query_pre_attn_scalar=256,  # as in all models of this size; a GGUF file does not say it
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def parts(original, tmp_path_factory):
    """`original` as llama.cpp lays it out (norms less one are stored whole), cut into four files."""
    folder, c = tmp_path_factory.mktemp("parts"), original.config
    with written(folder / "whole.gguf", "gemma3", c, SPECIAL, LETTERS) as w:
        w.add_key_length(c.head_dim)
        w.add_value_length(c.head_dim)
        w.add_sliding_window(c.sliding_window)
        w.add_rope_freq_base(1_000_000.0)
        w.add_tokenizer_model("llama")
        w.add_token_scores([0.0] * len(SPECIAL) + [-float(place) for place in range(len(LETTERS))])
        for name, number in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
            getattr(w, f"add_{name}_token_id")(number)
        for target, _, tensor in weights(original, gguf.MODEL_ARCH.GEMMA3):
            w.add_tensor(target, (tensor + 1 if tensor.ndim == 1 else tensor).numpy())
    data = (folder / "whole.gguf").read_bytes()
    size = -(-len(data) // 4)
    found = [folder / f"gemma.part{number}" for number in range(4)]
    for number, path in enumerate(found):
        path.write_bytes(data[number * size : (number + 1) * size])
    return found


def sha256(paths):
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def test_the_converted_model_answers_as_the_original_and_a_line_end_ends_a_trace(original, parts, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    gemma3.write(folder, parts, sha256(parts))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        found, expected = model.float()(ids).logits, original(ids).logits
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()  # bf16 keeps 8 bits
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "2+2"}], tokenize=False)
    assert text == "<bos>2+2\nAnswer:"
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert [tokenizer.convert_ids_to_tokens(end) for end in ends] == ["<eos>", "\n"]


def test_parts_that_are_another_file_are_refused(parts, tmp_path):
    with pytest.raises(ModelError, match=r"do not make the expected file.*Install them again"):
        gemma3.join(parts, tmp_path / "whole", "0" * 64)
    with pytest.raises(ModelError, match="do not make the expected file"):
        gemma3.join([parts[1], parts[0], *parts[2:]], tmp_path / "whole", sha256(parts))


def test_a_missing_part_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(gemma3, "PACKAGES", ("no_such_package_part1",))
    importlib.invalidate_caches()
    app = typer.Typer()
    app.command()(gemma3.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "model")])
    assert result.exit_code == 2
    assert "no-such-package-part1" in result.output
    assert gemma3.INSTALL in result.output
    assert not (tmp_path / "model").exists()


def test_a_file_that_lacks_a_weight_is_refused(parts, tmp_path):
    """transformers draws a weight that is not there at random, and says so in a log alone."""
    data = b"".join(path.read_bytes() for path in parts)
    (tmp_path / "gemma.gguf").write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(ModelError, match=r"has no weight model\.layers\.1\.mlp\.up_proj\.weight, and lacks 1 in all"):
        dequantise(tmp_path / "gemma.gguf", "Install it again")
