"""A rank without enough memory: the error says what a rank needs, by part, and which setting to lower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from pipeline.config import Run
from pipeline.errors import TrainingError, first_line
from pipeline.fit import footprint
from pipeline.fit.machine import GIB

_SIGNS = ("out of memory", "can't allocate memory", "alloc_failed")  # of torch on a GPU, torch on a CPU, cuBLAS


@contextlib.contextmanager
def explained(run: Run, device: torch.device) -> Iterator[None]:
    """Raise TrainingError with the arithmetic where the block runs out of memory. It would do so again, so nobody tries again."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        part, remedy = _to_lower(run)
        what = f"out of memory ({first_line(error)[:200]}). A rank needs {part}{_card(device)}"
        raise TrainingError(what, "train", remedy) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch is about memory. Apart from `torch.OutOfMemoryError` its message is the only sign."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in text for sign in _SIGNS)


def _to_lower(run: Run) -> tuple[str, str]:
    """The bytes of a rank in words, and the setting that makes its largest part smaller. The weights of a model are given."""
    parts = footprint.rank_bytes(run, footprint.measure(run.model))
    train, window = run.train, run.model.max_model_len
    tokens = (
        f"train.micro_batch_tokens (now {train.micro_batch_tokens})"
        if train.micro_batch_tokens > window
        else f"model.max_model_len (now {window}; a micro-batch holds a whole trace)"
    )
    more = (
        f"raise train.workers (now {train.workers})"
        if train.strategy == "fsdp2"
        else "train.strategy fsdp2 with more train.workers"
    )
    remedies = {
        "logits": f"Lower train.head_chunk_tokens (now {train.head_chunk_tokens})",
        "LoRA and AdamW": f"Lower model.lora_rank (now {run.model.lora_rank})",
        "gradients and AdamW": f"Set model.tuning lora, or {more}",
    }
    if footprint.START in parts:
        return footprint.summed(parts), footprint.WHOLE
    checkpointing = "" if train.gradient_checkpointing else ", or set train.gradient_checkpointing true"
    largest = max(parts.keys() - {"weights"}, key=lambda name: parts[name])
    return footprint.summed(parts), remedies.get(largest, f"Lower {tokens}{checkpointing}")


def _card(device: torch.device) -> str:
    """What the card of a rank has, and what other processes hold of it. "" on a CPU."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return f"; the card has {total / GIB:.2f} GiB, of which about {others / GIB:.2f} are not this rank's"
