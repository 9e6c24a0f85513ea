"""The exponential mean of adapters is that of A and of B, and not that of B A."""

import pytest
import torch

from pipeline.method.averages import averaged


def adapter(a, b):
    return {"q.lora_A.weight": torch.tensor([[a]]), "q.lora_B.weight": torch.tensor([[b]])}


def product(weights):
    return float(weights["q.lora_B.weight"] @ weights["q.lora_A.weight"])


def test_the_mean_of_two_adapters_with_its_arithmetic():
    first = averaged(None, adapter(2.0, 1.0), 0.75)
    assert product(first) == 0.25 * 2.0  # exactly (1 - rate) B A
    second = averaged(first, adapter(4.0, 3.0), 0.75)
    assert second["q.lora_A.weight"].item() == 0.75 * 2 + 0.25 * 4
    assert second["q.lora_B.weight"].item() == 0.75 * 0.25 + 0.25 * 3
    assert product(second) == 2.5 * 0.9375
    assert product(second) != 0.75 * product(first) + 0.25 * 12.0  # the mean of B A is 3.375


def test_half_precision_does_not_stand_still_and_other_shapes_are_refused():
    half = {name: weight.bfloat16() for name, weight in adapter(1.0, 1.0).items()}
    mean = averaged(averaged(None, half, 0.999), half, 0.999)
    assert mean["q.lora_B.weight"].dtype == torch.float32
    assert mean["q.lora_B.weight"].item() == pytest.approx(1 - 0.999**2, abs=1e-6)
    with pytest.raises(ValueError, match="differ in name or shape"):
        averaged({"x": torch.zeros(1)}, half, 0.5)
