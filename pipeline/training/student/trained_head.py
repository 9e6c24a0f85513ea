"""The output head where it is trained too: the numbers of head.py, and the gradients of its weight and bias.

They are summed over the chunks while the logits of a chunk exist, so that `[B, T, V]` never does. One buffer of the size of the
weight holds the sum of a forward pass, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.method.objective import head_gradient_, weighted_sum
from pipeline.training.student.head import Head, Terms, chunks, logits_of, slopes_, through, widened


def trained(hidden: Tensor, layer: tuple[Tensor, Tensor | None], head: Head, terms: Terms) -> tuple[Tensor, ...]:
    """As head.weighted_logprob or, with a divergence, head.with_divergence; the sum also carries the gradient to the layer.

    layer: weight float32 [V, H] and bias of the head, which are trained. head: the same in the dtype of the product.
    """
    total, logprobs, values = _Trained.apply(hidden, *layer, head, terms)
    return (total, logprobs) if terms.divergence is None else (total, logprobs, values)


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, terms: Terms
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes `trained`, and keeps the gradients that it makes while the logits of a chunk exist."""
        targets, coefficients, divergence, _ = terms
        logprobs, values = (torch.zeros(len(targets), dtype=torch.float32, device=hidden.device) for _ in range(2))
        of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        of_bias = None if bias is None else torch.zeros_like(bias)
        head = widened(head)
        for part in chunks(len(targets), head):
            logits, slope = logits_of(hidden[part], head)
            if divergence is None:
                logprobs[part] = slopes_(logits, targets[part], coefficients[part])
            else:
                some = targets[part], coefficients[part], divergence.kept.part(part)
                logprobs[part], values[part] = head_gradient_(logits, *some, divergence.measure, divergence.support)
            of_hidden[part] = through(logits, slope, head).to(hidden.dtype)  # from here on logits are times the slope
            of_weight.addmm_(logits.T.to(weight.dtype), hidden[part].to(weight.dtype))
            if of_bias is not None:
                of_bias += logits.sum(0)
            del logits  # two chunks never have their logits at the same time
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.mark_non_differentiable(logprobs, values)
        total = weighted_sum(logprobs, coefficients)
        return total if divergence is None else total + weighted_sum(values, divergence.kept.weights), logprobs, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
        """The kept gradients times the gradient of the sum."""
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        scaled = (None if kept is None else kept * grad_total.to(kept.dtype) for kept in (of_hidden, of_weight, of_bias))
        return (*scaled, None, None)
