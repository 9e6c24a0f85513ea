"""The chunked head gives the value and the gradient of full logits, without their memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.method.objective import Kept, forward_kl
from pipeline.training.student import head
from pipeline.training.student.head import Divergence, Head, logprobs_of, weighted_logprob, with_divergence

N, H, V = 23, 8, 50


def draw(bias: bool = False, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=dtype, requires_grad=True)
    head, targets, coefficients = torch.randn(V, H, dtype=dtype), torch.randint(V, (N,)), torch.randn(N)
    return hidden, head, torch.randn(V, dtype=dtype) if bias else None, targets, coefficients


@pytest.mark.parametrize("chunk", [1, 7, 23, 1024])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_are_those_of_full_logits(chunk: int, bias: bool) -> None:
    hidden, head, offset, targets, coefficients = draw(bias)
    total, logprobs = weighted_logprob(hidden, Head(head, offset, chunk), targets, coefficients)
    (3 * total).backward()
    found, hidden.grad = hidden.grad, None
    full = torch.nn.functional.linear(hidden, head, offset).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (3 * (coefficients * full).sum()).backward()
    torch.testing.assert_close(logprobs, full.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, hidden.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("scale", "cap"), [(0.25, 0.0), (1.0, 2.0), (3.0, 5.0)])
def test_scaled_and_capped_logits_have_the_gradient_of_the_model_s_own(scale: float, cap: float) -> None:
    hidden, weight, offset, targets, coefficients = draw(True)
    kept = Kept(torch.randint(V, (N, 1)), torch.full((N, 1), -1.0), torch.rand(N))
    divergence = Divergence(kept, forward_kl, "tail")
    shaped = Head(weight, offset, 7, scale, cap)
    total, logprobs, values = with_divergence(hidden, shaped, targets, coefficients, divergence)
    total.backward()
    found, hidden.grad = hidden.grad, None
    logits = scale * torch.nn.functional.linear(hidden, weight, offset)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    plain = Head(torch.eye(V, dtype=torch.float64), None, 7)  # the same head, of the model's own logits
    expected, *others = with_divergence(logits, plain, targets, coefficients, divergence)
    expected.backward()
    torch.testing.assert_close(logprobs_of(hidden, shaped, targets), others[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((logprobs, values), tuple(others), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, hidden.grad, atol=1e-5, rtol=1e-5)


def test_far_logits_stay_finite() -> None:
    hidden, head, _, targets, coefficients = draw(dtype=torch.float32)
    total, logprobs = weighted_logprob(hidden * 1e4, Head(head, None, 8), targets, coefficients)
    total.backward()
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(hidden.grad).all()


def test_no_token_at_all_still_has_a_backward_pass() -> None:
    hidden, head, *_ = draw()
    total, logprobs = weighted_logprob(hidden[:0], Head(head, None, 8), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    total.backward()
    assert total == 0
    assert logprobs.shape == (0,)
    assert not hidden.grad.any()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_of_all_tokens_never_exist() -> None:
    hidden, head, _, targets, coefficients = draw()
    with LargestTensor() as seen:
        weighted_logprob(hidden, Head(head, None, 4), targets, coefficients)[0].backward()
    assert seen.elements <= max(4 * V, head.numel())
    assert seen.elements < N * V


def test_large_logits_in_half_precision_are_those_of_a_head_in_double_precision() -> None:
    """A product in bfloat16 rounds logits near 22 to eighths."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16(), (torch.randn(500, 32) * 1.25).bfloat16()
    exact = hidden.double() @ weight.double().T
    assert 20 < exact.max(1).values.median() < 24
    targets = exact.topk(3).indices[:, 2]
    expected = exact.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    _, logprobs = weighted_logprob(hidden, Head(weight, None, 16), targets, torch.ones(64))
    assert (logprobs - expected).abs().max() < 0.005
    rounded = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert (rounded - expected).abs().max() > 0.03


class Products(TorchDispatchMode):
    """Remembers the types of what is multiplied. A fake card multiplies different types, and a real one refuses them."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[tuple[torch.dtype, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in str(func):
            self.types.append(tuple(arg.dtype for arg in args[:2]))
        return func(*args, **(kwargs or {}))


def test_on_a_card_hidden_states_in_float32_take_the_type_of_the_weight() -> None:
    """Where all weights train in bfloat16, autocast leaves the last norm in float32. A card refused the product."""
    with FakeTensorMode(), Products() as seen, torch.no_grad():
        weight, hidden = torch.empty(500, 32, device="cuda", dtype=torch.bfloat16), torch.empty(16, 32, device="cuda")
        logits, _ = head.logits_of(hidden, Head(weight, None, 16))
    assert logits.dtype == torch.float32
    assert seen.types == [(torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("cap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_card_logits_come_in_float32_without_a_copy_of_the_weight(dtype: torch.dtype, cap: float) -> None:
    """A fake card: the types are those of a real one, and there are no numbers."""
    with FakeTensorMode(), torch.no_grad():
        weight = torch.empty(500, 32, device="cuda", dtype=dtype)
        wide = head.widened(Head(weight, None, 16, cap=cap))
        logits, slope = head.logits_of(torch.empty(16, 32, device="cuda", dtype=dtype), wide)
        assert wide.weight is weight
        assert (logits.dtype, logits.device.type, tuple(logits.shape)) == (torch.float32, "cuda", (16, 500))
        assert head.through(logits, slope, wide).dtype == dtype


# ---- a divergence beside the sampled tokens


def draw_kept() -> Divergence:
    """The teacher's five most likely tokens at every position."""
    teacher = torch.randn(N, V, generator=torch.Generator().manual_seed(7)).log_softmax(-1).topk(5)
    return Divergence(Kept(teacher.indices, teacher.values, torch.rand(N) + 0.1), forward_kl, "tail")


@pytest.mark.parametrize("chunk", [1, 7, 23, 1024])
def test_a_divergence_has_the_value_and_gradient_of_full_logits(chunk: int) -> None:
    (hidden, weight, _, targets, coefficients), spread = draw(), draw_kept()
    total, logprobs, values = with_divergence(hidden, Head(weight, None, chunk), targets, coefficients, spread)
    (3 * total).backward()
    found, hidden.grad = hidden.grad, None
    full = torch.nn.functional.linear(hidden, weight).log_softmax(-1)
    kept = spread.kept
    sides = ((side.exp(), 1 - side.exp().sum(1, keepdim=True)) for side in (kept.logprobs.double(), full.gather(1, kept.tokens)))
    teacher, student = (torch.cat(parts, 1) for parts in sides)
    expected = (teacher * (teacher / student).log()).sum(1)
    (3 * (kept.weights * expected + coefficients * full.gather(1, targets[:, None])[:, 0]).sum()).backward()
    torch.testing.assert_close(values.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, hidden.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logprobs, logprobs_of(hidden, Head(weight, None, chunk), targets), atol=1e-5, rtol=1e-5)


def test_a_divergence_without_a_token_still_has_a_backward_pass() -> None:
    (hidden, weight, *_), spread = draw(), draw_kept()
    none = spread._replace(kept=spread.kept.part(slice(0, 0)))
    total, *_ = with_divergence(hidden[:0], Head(weight, None, 8), torch.zeros(0, dtype=torch.int64), torch.zeros(0), none)
    total.backward()
    assert not hidden.grad.any()


@pytest.mark.parametrize("divergent", [False, True])
def test_the_logits_of_one_chunk_are_gone_before_those_of_the_next_are_made(divergent: bool, monkeypatch) -> None:
    made, plain = [], head.logits_of

    def watched(*arguments):
        assert not made or made[-1]() is None
        logits = plain(*arguments)
        made.append(weakref.ref(logits[0]))
        return logits

    monkeypatch.setattr(head, "logits_of", watched)
    hidden, weight, _, targets, coefficients = draw()
    if divergent:
        with_divergence(hidden, Head(weight, None, 4), targets, coefficients, draw_kept())
    else:
        weighted_logprob(hidden, Head(weight, None, 4), targets, coefficients)
    assert len(made) == 6
