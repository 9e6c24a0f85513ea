"""Gradients of the mean log-prob of traces under many token weights, and how far each token's gradient points along a direction.

The second is a Jacobian-vector product: d log p_t . r for every token at once, for the price of two forward passes. Gradients of
single tokens are never made. Both work on all weights of the model, the tied or separate head included, or on the adapter alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.method.objective import head_gradient_
from pipeline.models.head_form import Form
from pipeline.training.batches import MicroBatch
from pipeline.training.packing import attention
from pipeline.training.student.head import Divergence
from pipeline.training.student.student import Student

Space = Literal["weights", "adapter"]


class Directions:
    """One model, and the parameters by which gradients are taken.

    space: `weights` are all weights of the base, with the adapter in place as it is; `adapter` are those that training moves.
    At policy 0 the adapter's B is zero, and so is the gradient of its A. By all weights the base takes the adapter into its own,
    because the gradient is the same there and costs less. All is computed in float32. Raises ModelError for a model that scales
    or caps its logits.
    """

    def __init__(self, student: Student, space: Space) -> None:
        self.student = student.eval()
        base: Any = student.base
        if student.form != Form():
            what = f"scales or caps its logits ({student.form}), which these gradients leave out"
            raise ModelError(what, str(base.config.name_or_path), "Use a model whose logits are the output layer's")
        attention.uninstall(base)
        base.config._attn_implementation = "eager"  # the fused kernels have no forward-mode derivative
        if student.packs and (why := attention.install(base)):
            raise ModelError(f"cannot run packed micro-batches: {why}", str(base.config.name_or_path), "Set train.packing padded")
        student.model.float()
        student.product = torch.float32
        if space == "weights" and not student.trains_all:
            student.model.merge_adapter()
        self.decoder: Any = base.get_decoder()
        head = base.get_output_embeddings()
        self.head, self.bias = head.weight, getattr(head, "bias", None)
        for name, parameter in student.model.named_parameters():
            parameter.requires_grad_(("lora_" in name) == (space == "adapter"))
        self.named = {name: p for name, p in self.decoder.named_parameters() if p.requires_grad}
        self.head_place = next((place for place, p in enumerate(self.named.values()) if p is self.head), None)
        self.moves_head = space == "weights"
        sizes = [p.numel() for p in self.named.values()]
        if self.moves_head and self.head_place is None:
            sizes.append(self.head.numel())
        if not sizes:
            raise ModelError(
                "has no adapter, because all its weights are trained", str(base.config.name_or_path), "Audit `weights`"
            )
        self.sizes = sizes

    @property
    def size(self) -> int:
        """Number of parameters P."""
        return sum(self.sizes)

    def gradients(self, micro: MicroBatch, weights: Sequence[Tensor], divergences: Mapping[int, Divergence]) -> Tensor:
        """Gradients of sum_n w_n log p_n, one for each set of weights [N] of the micro-batch's response tokens -> [K, P].

        divergences: by the place of a set, what is subtracted from its sum, at the same N tokens.
        """
        hidden = self.student.states(micro.tokens, micro.sources, micro.layout)
        fixed, head = hidden.detach(), self.head.detach()
        logits = self._logits(fixed, head)
        chances = logits.softmax(-1)
        slopes = head[micro.targets] - chances @ head
        parameters, found = list(self.named.values()), []
        for place, weight in enumerate(weights):
            moved, errors = slopes * weight[:, None], None
            if place in divergences:
                errors = _ascent(logits, micro.targets, weight, divergences[place])
                moved = errors @ head
            flow = torch.autograd.grad(hidden, parameters, moved, retain_graph=place + 1 < len(weights), allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for g, p in zip(flow, parameters, strict=True)]
            if self.moves_head:
                if errors is None:
                    errors = chances * -weight[:, None]
                    errors.scatter_add_(1, micro.targets[:, None], weight[:, None])
                self._add_head(parts, errors.T @ fixed)
            found.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(found)

    @torch.no_grad()
    def alignments(
        self, micro: MicroBatch, direction: Tensor, divergences: Sequence[Divergence] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """d log p_n . r for every response token [N], where the direction r is [P]: the Jacobian-vector product along it.

        Of each divergence at these tokens, too: how fast the weighted divergence of every token falls along r, [N].
        """
        parts = direction.split(self.sizes)
        tangents = {}
        for name, part in zip(self.named, parts, strict=False):  # the head may come after the decoder's parameters
            tangents[name] = part.view_as(self.named[name])
        fixed = {name: p.detach() for name, p in self.named.items()}

        def states(parameters: dict[str, Tensor]) -> Tensor:
            with attention.placed(micro.layout) as more:
                asked = {"input_ids": micro.tokens, "use_cache": False, **more}
                found = torch.func.functional_call(self.decoder, parameters, kwargs=asked)
            return found.last_hidden_state.flatten(0, 1)[micro.sources]

        hidden, moved = torch.func.jvp(states, (fixed,), (tangents,))  # type: ignore[misc]  # three with has_aux alone
        head = self.head.detach()
        slopes = torch.nn.functional.linear(moved, head)
        if self.moves_head:
            place = len(parts) - 1 if self.head_place is None else self.head_place
            slopes = slopes + torch.nn.functional.linear(hidden, parts[place].view_as(head))
        logits = self._logits(hidden, head)
        aligned = slopes.gather(1, micro.targets[:, None])[:, 0] - (logits.softmax(-1) * slopes).sum(1)
        none = torch.zeros_like(aligned)
        return aligned, [(_ascent(logits, micro.targets, none, one) * slopes).sum(1) for one in divergences]

    def _logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, head, self.bias)

    def _add_head(self, parts: list[Tensor], gradient: Tensor) -> None:
        if self.head_place is None:
            parts.append(gradient)
        else:
            parts[self.head_place] = parts[self.head_place] + gradient


def _ascent(logits: Tensor, targets: Tensor, weights: Tensor, divergence: Divergence) -> Tensor:
    """Gradient of sum_n (w_n log p_n - divergence_n) by the logits [N, V]: where an objective with a divergence goes."""
    slopes = logits.detach().clone()
    head_gradient_(slopes, targets, -weights, *divergence)
    return slopes.neg_()
