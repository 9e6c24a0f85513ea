"""Gradients of one sample of traces under many sets of token weights: what another gate would have changed. Torch only.

A gradient is linear in the token weights, and d log p_n / d h_n is the same for every set. One forward pass and one pass through
the head therefore serve all sets. Each set costs one backward pass through the layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.method.objective import coefficients
from pipeline.training.batches import Traces, micro_batch, pack
from pipeline.training.student import Student


def gradients(student: Student, traces: Traces, rows: np.ndarray, weights: Sequence[np.ndarray], budget: int) -> Tensor:
    """Gradients of -sum(A_t log p_t) (numerator of 2605.13255, Eq. 7) with respect to the adapter, one per set of token weights.

    `rows` [B] of the traces, one after the other, have N response tokens; weights K x [N] -> float32 [K, P] for P parameters.
    `budget` padded tokens make a forward pass. Dropout is the caller's choice (`student.eval()`).
    """
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    total = torch.zeros(len(weights), sum(p.numel() for p in parameters), device=parameters[0].device)
    lengths = traces.response_tokens.lengths[rows]
    starts = np.cumsum(lengths) - lengths
    for chosen in pack(traces.lengths[rows], budget):
        micro = micro_batch(traces, rows[chosen]).to(total.device)
        tokens = np.concatenate([np.arange(starts[row], starts[row] + lengths[row]) for row in chosen])
        hidden = student.states(micro.tokens, micro.sources)
        slopes = _slopes(student, hidden, micro.targets)
        for k, weight in enumerate(weights):
            factors = coefficients(torch.from_numpy(weight[tokens]), num_tokens=1).to(slopes)
            flow = torch.autograd.grad(hidden, parameters, slopes * factors[:, None], retain_graph=k + 1 < len(weights))
            total[k] += torch.cat([part.flatten() for part in flow])
    return total


def cosines(
    student: Student,
    traces: Traces,
    rows: np.ndarray,
    weights: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    budget: int,
) -> np.ndarray:
    """Cosine of the gradient under each set of token weights with that under its reference: [K], NaN where one is zero.

    Arguments as in `gradients`. Sets that are equal share one gradient.
    """
    sets = {weight.tobytes(): weight for weight in (*weights, *references)}
    place = {key: index for index, key in enumerate(sets)}
    found = gradients(student, traces, rows, list(sets.values()), budget).double()
    norms = found.norm(dim=1)
    one, other = ([place[weight.tobytes()] for weight in part] for part in (weights, references))
    products = (found[one] * found[other]).sum(1) / (norms[one] * norms[other])  # 0 / 0 is NaN, as it should be
    return products.cpu().numpy()


def _slopes(student: Student, hidden: Tensor, targets: Tensor) -> Tensor:
    """d log p_n / d h_n, [N, H]."""
    leaf = hidden.detach().requires_grad_()
    total, _ = student.head(leaf, targets, torch.ones(len(targets), device=hidden.device))
    return torch.autograd.grad(total, leaf)[0]
