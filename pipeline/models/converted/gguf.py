"""Turn a model that a package ships as a GGUF file into a safetensors folder, which transformers and vLLM open.

The folder holds bf16 weights, configuration, tokenizer and chat template. It appears under its name only when it is whole. A
converted folder that is already there is left as it is. transformers is imported late: it reads HF_HUB_OFFLINE at its import.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from pipeline.errors import EgrsdError, ModelError

EXPECTED_FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")


def dequantise(gguf: Path, remedy: str) -> Any:
    """The model in a GGUF file as plain bf16 weights. Its configuration no longer names the quantisation.

    Raises ModelError with the remedy when the file is damaged, or lacks a weight: transformers would draw it at random.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
        )
    except (ValueError, struct.error) as error:
        raise ModelError(f"cannot be read as GGUF: {error}", str(gguf), remedy) from error
    loaded, told = found
    tied = set(getattr(loaded, "_tied_weights_keys", None) or ()) if loaded.config.tie_word_embeddings else set()
    if missing := sorted(set(told["missing_keys"]) - tied):
        raise ModelError(f"has no weight {missing[0]}, and lacks {len(missing)} in all", str(gguf), remedy)
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    plain: Any = type(loaded)(type(loaded.config)(**settings))
    plain.to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    return plain


def tokenizer_in(gguf: Path) -> Any:
    """The tokenizer in a GGUF file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


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


def command(out: Path, convert: Callable[[], bool]) -> None:
    """Run a conversion as a command line does: no hub is asked, and an error is one line with its exit code."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        written = convert()
    except EgrsdError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    typer.echo(f"{'wrote' if written else 'already there:'} {out}")
