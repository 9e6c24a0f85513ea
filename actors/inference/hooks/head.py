"""The output head of a half-precision model on a CPU, with its weight in float32.

In half precision a logit near 22 is rounded to eighths, so engines compute the head in float32 (startup.engine_args). On a CPU
vLLM then makes a float32 copy of the whole weight for every batch of rows: 113 MB for SmolLM2, in 40 ms. This hook keeps the
copy. It takes the memory that vLLM takes anyway while it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actors.inference.hooks import replace

_WIDE = "egrsd_wide"  # the attribute of a head that holds the copy


def install() -> bool:
    """Change this process's vLLM, once. False when it has no such place: then it makes a copy for each batch."""
    return replace("vllm.model_executor.layers.logits_processor:LogitsProcessor", "_apply_head", "keeps", _keeping)


def _keeping(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_head(self: Any, lm_head: Any, hidden_states: Tensor, embedding_bias: Tensor | None) -> Tensor:
        """Logits [N, V] of hidden states [N, H]: float32 from half precision on a CPU, and otherwise the original's."""
        weight = getattr(lm_head, "weight", None)
        narrow = hidden_states.dtype in (torch.bfloat16, torch.float16) and hidden_states.device.type == "cpu"
        if not narrow or self.head_dtype != torch.float32 or weight is None or weight.dtype != hidden_states.dtype:
            return original(self, lm_head, hidden_states, embedding_bias)
        wide = vars(lm_head).get(_WIDE)
        if wide is None:
            wide = weight.detach().float()
            vars(lm_head)[_WIDE] = wide
        bias = None if embedding_bias is None else embedding_bias.float()
        return torch.nn.functional.linear(hidden_states.float(), wide, bias)

    return apply_head


def forget(model: Any) -> None:
    """Drop the copies in a model whose weights were changed in place."""
    for module in model.modules():
        vars(module).pop(_WIDE, None)
