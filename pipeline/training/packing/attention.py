"""Attention over a packed micro-batch: one stream of tokens without padding, in which traces of one prompt share its tokens.

    stream: | prompt a | response 1 | response 2 | response 3 | prompt b | response 4 | response 5 | trace 6 | trace 7 |
    part:   |-------------------- part a --------------------|-------------- part b ---------------|----- part ------|

Every layer but attention computes each token by itself, so the stream is as good as a padded square. In attention the tokens of a
response see those of their prompt and, in causal order, their own. The stream is therefore cut into blocks, and the model's own
attention function computes every block with the model's own mask for it: a block is a piece of an ordinary sequence that goes on
from a prompt, as with a cache of keys and values. Sliding windows, chunks and soft caps thus stay what they are in the model.
Gradients through a prompt are exact: autograd adds up what flows back from its responses.

`install` registers the attention with transformers. `fits` compares it with the padded pass and finds the models for which it is
wrong: layers that mix tokens elsewhere (Mamba, convolutions), or positions that are not counted by `position_ids` (ALiBi).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

PREFIX = "egrsd_packed_"  # before the name of the model's own implementation


class PackingError(Exception):
    """A model cannot run a packed micro-batch. The message says why."""


@dataclass(frozen=True, eq=False)
class Block:
    """S tokens of n traces that attention computes together, as a square [n, width]: the longest trace has `width` tokens.

    cells [n * width] int64 are the places in the block that fill the square by rows. A padded cell repeats a token of its row.
    taken [S] int64 are the cells that hold the block's tokens.
    """

    width: int
    cells: Tensor
    taken: Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """A prompt of `prompt` tokens and the responses to it. Without a prompt (0) the blocks hold whole traces."""

    prompt: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """What the stream of L tokens consists of. positions [1, L]: the place of every token in its own trace, from 0."""

    positions: Tensor
    parts: tuple[Part, ...]

    @property
    def sizes(self) -> list[int]:
        """Tokens of every prompt and block, in the order of the stream."""
        return [size for part in self.parts for size in ([part.prompt] * (part.prompt > 0) + [len(b.taken) for b in part.blocks])]

    def to(self, device: torch.device) -> Layout:
        """The same layout on `device`."""
        parts = [
            replace(p, blocks=tuple(replace(b, cells=b.cells.to(device), taken=b.taken.to(device)) for b in p.blocks))
            for p in self.parts
        ]
        return Layout(self.positions.to(device), tuple(parts))


class Masks:
    """Stands where a layer expects its mask. It makes the mask of a block, with the model's function for that kind of layer."""

    def __init__(self, layout: Layout, make: Callable[..., Tensor | None], settings: dict[str, Any]) -> None:
        self.layout = layout
        self._make, self._settings = make, settings
        self._made: dict[tuple[int, int], Tensor | None] = {}

    def of(self, queries: int, keys: int) -> Tensor | None:
        """The mask of the last `queries` of `keys` positions of a sequence. None where the model's attention needs none."""
        if (queries, keys) not in self._made:
            asked = {"batch_size": 1, "q_length": queries, "kv_length": keys, "q_offset": keys - queries, "kv_offset": 0}
            self._made[queries, keys] = self._make(**self._settings | asked | {"attention_mask": None})
        return self._made[queries, keys]


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


def install(base: Any) -> str:
    """Let a transformers model take packed micro-batches. Returns "", or why it cannot.

    Padded micro-batches then go through the same functions as before.
    """
    own = base.config._attn_implementation
    masks: Any = AttentionMaskInterface._global_mapping.get(own)
    if not base._can_set_attn_implementation() or masks is None:
        return "its attention is not a function that transformers lets one replace"
    AttentionMaskInterface.register(PREFIX + own, _packed_mask(masks))
    AttentionInterface.register(PREFIX + own, _packed_attention(AttentionInterface._global_mapping.get(own)))
    base.set_attn_implementation(PREFIX + own)
    return ""


def uninstall(base: Any) -> None:
    """Give a model its own attention back."""
    if base.config._attn_implementation.startswith(PREFIX):
        base.set_attn_implementation(base.config._attn_implementation.removeprefix(PREFIX))


@contextmanager
def placed(layout: Layout | None) -> Iterator[dict[str, Tensor]]:
    """A block in which a decoder runs one micro-batch; yields the arguments that it takes beside the tokens.

    The mask of ones keeps transformers from reading the positions as several sequences, whose prompts would be hidden.
    """
    token = _layout.set(layout)
    try:
        yield (
            {}
            if layout is None
            else {
                "position_ids": layout.positions,
                "attention_mask": torch.ones_like(layout.positions),
            }
        )
    finally:
        _layout.reset(token)


def _packed_mask(make: Callable[..., Tensor | None]) -> Callable[..., Any]:
    """The mask function of an implementation, which returns `Masks` for a packed micro-batch."""

    def packed(*args: Any, **settings: Any) -> Any:
        layout = _layout.get()
        return make(*args, **settings) if layout is None else Masks(layout, make, settings)

    return packed


def _packed_attention(own: Callable[..., Any] | None) -> Callable[..., Any]:
    """The attention function of an implementation, which takes packed micro-batches too. None: the eager one of each model."""

    def packed(module: Any, *states: Any, **settings: Any) -> tuple[Tensor, Any]:
        """`states`: query, key and value, the mask, and what some models give by position after it."""
        query, key, value, attention_mask, *args = states
        attend = own or sys.modules[type(module).__module__].eager_attention_forward
        if isinstance(attention_mask, Masks):
            if settings.get("position_bias") is not None:
                raise PackingError("its attention adds a bias by position")
            return _by_blocks(attend, module, (query, key, value), attention_mask, args, settings), None
        if _layout.get() is not None:
            raise PackingError("its attention does not take the mask that transformers makes")
        return attend(module, query, key, value, attention_mask, *args, **settings)  # type: ignore[no-any-return]

    return packed


def _by_blocks(
    attend: Callable[..., Any], module: Any, states: tuple[Tensor, Tensor, Tensor], masks: Masks, args: Any, settings: Any
) -> Tensor:
    """Attention of the stream: query, key and value [1, heads, L, D] -> [1, L, heads, D]."""
    pieces = iter(zip(*(state.split(masks.layout.sizes, dim=2) for state in states), strict=True))  # one `cat` in backward
    found = []
    for part in masks.layout.parts:
        before: tuple[Tensor, ...] = ()
        if part.prompt:
            query, *before_ = next(pieces)
            before = tuple(before_)
            found.append(attend(module, query, *before, masks.of(part.prompt, part.prompt), *args, **settings)[0].flatten(0, 1))
        for block in part.blocks:
            query, *others = (_square(piece, block) for piece in next(pieces))
            if before:
                others = [torch.cat([b.expand(len(o), -1, -1, -1), o], dim=2) for b, o in zip(before, others, strict=True)]
            mask = masks.of(block.width, part.prompt + block.width)
            square = attend(module, query, *others, mask, *args, **settings)[0]
            found.append(square.flatten(0, 1).index_select(0, block.taken))
    return torch.cat(found)[None]


def _square(piece: Tensor, block: Block) -> Tensor:
    """Tokens of a block [1, heads, S, D] as the square [n, heads, width, D]."""
    heads, size = piece.shape[1], piece.shape[3]
    if len(block.cells) == block.width:
        return piece
    return piece[0].index_select(1, block.cells).view(heads, -1, block.width, size).transpose(0, 1)
