"""The exponential mean of adapters, for a teacher that follows the student slowly.

LoRA adds B A (times a constant) to a weight. The mean that is made here is that of A and that of B, each by itself, as peers make
it. The mean of B A is another matrix: mean(B) mean(A) = mean(B A) - cov(B, A). Its rank may exceed the adapter's, so it is no
adapter of the same size. Where all weights are trained instead of an adapter, the mean of the weights is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def averaged(mean: Mapping[str, Tensor] | None, adapter: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
    """rate x mean + (1 - rate) x adapter for every weight, float32.

    mean: the mean before; None stands for the base, whose B is 0 and whose A decides nothing. Then A is the adapter's, so that
    the first mean is exactly (1 - rate) B A. Raises ValueError when the weights differ in name or shape.
    """
    new = {name: weight.float() for name, weight in adapter.items()}
    if mean is None:
        return {name: weight if ".lora_A." in name else (1 - rate) * weight for name, weight in new.items()}
    if {name: weight.shape for name, weight in mean.items()} != {name: weight.shape for name, weight in new.items()}:
        raise ValueError("the weights of mean and adapter differ in name or shape")
    return {name: rate * mean[name] + (1 - rate) * weight for name, weight in new.items()}
