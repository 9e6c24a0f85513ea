"""What stands behind a model's path: hashes of its files, by which a run notices that another model lies there.

Files of weights are too large to be read whole. Their hash takes the header, which names every tensor with its type and shape,
and a few bytes of every tensor. Training changes all parts of a tensor, so these bytes show it. A model of 70 B parameters takes
less than a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import Model
from pipeline.models.resolve import resolve_model
from pipeline.notices import NOTICE_S, late

_READ = re.compile(
    r"(config|generation_config)\.json|.*\.py|.*\.tiktoken"
    r"|(tokenizer|chat_template|vocab|merges|special_tokens|added_tokens|spiece|sentencepiece).*"
)
_WEIGHTS = re.compile(r".*\.safetensors|.*\.gguf|pytorch_model.*\.bin")
_BLOCK, _PIECE = 64 * 1024, 4096  # bytes of a file's start, middle and end; bytes of a tensor
_PIECES = 2048  # tensors of a model that are looked at; more would take seconds on a network disk
_LONGEST = 100_000_000  # bytes of a header, as safetensors itself has it
_READERS = 8


@dataclass(frozen=True)
class Content:
    """The files of a model by their names, with a hash of each, wherever their folder lies.

    commit: that of a hub's model. Its local copy may lack files. None for a folder.
    files: configuration, tokenizer, chat template and code, with the sha256 of each.
    weights: hashes of samples of each file of weights.
    """

    commit: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)


def content_of(model: Model, weights: bool = True) -> Content | None:
    """The content of a model on this machine, or None where it is not here or cannot be read. Nothing is loaded or fetched.

    `weights` False leaves the weights out: those of a server's model are not the ones in the folder.
    """
    path = resolve_model(model.path)
    folder = Path(path) if os.path.isdir(path) else _hub_copy(path, model.revision)
    if folder is None:
        return None
    commit = None if os.path.isdir(path) else folder.name
    try:
        with late(f"files {path}", f"the files of the model {path} have been looked at for {NOTICE_S:g} s so far."):
            names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
            heavy = [name for name in names if weights and _WEIGHTS.fullmatch(name)]
            most = max(16, _PIECES // max(1, len(heavy)))
            with ThreadPoolExecutor(_READERS) as pool:
                sampled = dict(zip(heavy, pool.map(lambda name: sampled_hash(folder / name, most), heavy), strict=True))
            read = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names if _READ.fullmatch(name)}
    except OSError:  # who loads the model says what is wrong with it
        return None
    return Content(commit, read, sampled)


def sampled_hash(path: Path, most: int = _PIECES) -> str:
    """Hash of a file of weights: its size, its header, its start, middle and end, and a piece of at most `most` tensors.

    The header is that of safetensors. A file of another kind has no tensors that are known. Raises OSError.
    """
    size = path.stat().st_size
    seen = hashlib.sha256(str(size).encode())
    with path.open("rb", buffering=0) as file:
        header = _header(file.read(8), size)
        seen.update(text := file.read(header))
        places = [(0, _BLOCK), (max(0, (size - _BLOCK) // 2), _BLOCK), (max(0, size - _BLOCK), _BLOCK)]
        middles = sorted(_middles(text))
        step = max(1, -(-len(middles) // most))
        for place, length in [*places, *((8 + header + middle, _PIECE) for middle in middles[::step])]:
            file.seek(place)
            seen.update(file.read(length))
    return seen.hexdigest()


def _header(begin: bytes, size: int) -> int:
    """Bytes of the header that the first 8 bytes of a safetensors file promise. 0 where they cannot be right."""
    length = int.from_bytes(begin, "little")
    return length if length <= min(size, _LONGEST) else 0


def _middles(header: bytes) -> Iterator[int]:
    """Where a piece of each tensor begins, in its middle, counted from the end of the header. Nothing for another header."""
    try:
        tensors = json.loads(header)
        for name, tensor in tensors.items():
            if name != "__metadata__":
                first, last = map(int, tensor["data_offsets"])
                yield min(max(0, first, (first + last - _PIECE) // 2), 2**48)
    except (ValueError, OverflowError, RecursionError, TypeError, KeyError, AttributeError):
        return


def _hub_copy(name: str, revision: str | None) -> Path | None:
    """The folder of a hub's model in the local copy of the hub, which is named by its commit. None where it is not there."""
    from huggingface_hub import try_to_load_from_cache  # takes 100 ms, which only a hub's model needs
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    except (HFValidationError, OSError):
        return None
    return Path(found).parent if isinstance(found, str) else None
