"""Gradients of one sample of traces under many sets of token weights, which show what another gate would change.

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
from pipeline.training.student.head import Terms
from pipeline.training.student.student import Student


def gradients(student: Student, traces: Traces, rows: np.ndarray, weights: Sequence[np.ndarray], budget: int) -> Tensor:
    """Gradients of -sum(A_t log p_t) (numerator of 2605.13255, Eq. 7) with respect to the adapter, one per set of token weights.

    `rows` [B] select traces that have N response tokens in all; weights K x [N] -> float32 [K, P] for P adapter parameters. A
    forward pass takes at most `budget` padded tokens. The caller decides about dropout (`student.eval()`).
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
            factors = coefficients(torch.from_numpy(weight[tokens]), 1).to(slopes)
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
    """Cosine of the gradient under each set of token weights with the gradient under its reference.

    weights and references K x [N] -> float64 [K], NaN where a gradient is zero. The other arguments are those of `gradients`.
    Equal sets share one gradient.
    """
    sets = {weight.tobytes(): weight for weight in (*weights, *references)}
    place = {key: index for index, key in enumerate(sets)}
    flows = gradients(student, traces, rows, list(sets.values()), budget).double()
    norms = flows.norm(dim=1)
    one, other = ([place[weight.tobytes()] for weight in part] for part in (weights, references))
    products = (flows[one] * flows[other]).sum(1) / (norms[one] * norms[other])  # 0 / 0 is NaN, as it should be
    return products.cpu().numpy()


def _slopes(student: Student, hidden: Tensor, targets: Tensor) -> Tensor:
    """d log p_n / d h_n, [N, H]."""
    leaf = hidden.detach().requires_grad_()
    total, _ = student.head(leaf, Terms(targets, torch.ones(len(targets), device=hidden.device)))
    return torch.autograd.grad(total, leaf)[0]
