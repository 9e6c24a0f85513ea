"""Whether gradients point where accuracy rises: estimates from inner products of gradients, without the gradients themselves.

The reference is the policy gradient of accuracy. A trace counts with its verdict minus the mean verdict of the other traces of
its problem. It has no ratio, no gate and no group normalisation, so its expectation is the gradient of accuracy.

Gradients come in M blocks of whole problems. Blocks share no trace, so the inner product of two different blocks has the product
of the expectations as its expectation. A block with itself adds its own noise. Every estimate below is therefore made of
products of different blocks, and is corrected for the noise of the reference and of the audited gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEFT_OUT = 8  # parts of the blocks that `adamw` leaves out in turn


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products of the gradients of M blocks.

    own [K, M, M]: of each weighting's. cross [K, M, M]: of those with the reference's. along [K, M, M]: cross by gradients of
    whole blocks, where own and cross are of a part of each block.
    """

    own: np.ndarray
    cross: np.ndarray
    along: np.ndarray

    @classmethod
    def of(cls, flows: Sequence[np.ndarray] | np.ndarray) -> Products:
        """From gradients K x [M, P] of K weightings, in float64 sums. Raises ValueError for fewer than three blocks."""
        shapes = {flow.shape for flow in flows}
        if len(shapes) != 1 or any(len(shape) != 2 or shape[0] < 3 for shape in shapes):
            raise ValueError(f"flows: shapes {sorted(shapes)}, expected [M, P] with three blocks at least")
        other = flows[0].astype(np.float64)
        own, cross = [], []
        for flow in flows:
            exact = flow.astype(np.float64)
            own.append(exact @ exact.T)
            cross.append(exact @ other.T)
        return cls(np.stack(own), np.stack(cross), np.stack(cross))

    @classmethod
    def of_parts(cls, flows: np.ndarray, references: np.ndarray, towards: np.ndarray) -> Products:
        """From gradients K x [M, P] of a part of each block, where gradients of whole blocks are too dear.

        references [M, P] are those of whole blocks. towards [K, M] are products of each weighting's gradient of a whole block
        with the mean reference of the other blocks. A Jacobian-vector product gives them. `along` are the products of parts with
        references, moved so that their mean over the other blocks is that of the whole block.
        """
        found, whole = cls.of(flows), references.astype(np.float64)
        along = np.stack([flow.astype(np.float64) @ whole.T for flow in flows])
        means = (along.sum(2) - np.einsum("kmm->km", along)) / (len(whole) - 1)
        along += (towards - means)[:, :, None]
        along[0] = whole @ whole.T
        return cls(found.own, found.cross, along)


@dataclass(frozen=True, eq=False)
class Estimates:
    """Figures of K weightings on R choices of blocks, each [R, K]. The first choice has every block once. NaN: no direction.

    cosine: of the expected gradient with the gradient of accuracy, the bias. minibatch: mean cosine of one block's gradient.
    share: share of the expected gradient in the squared norm of one block's gradient, the signal; the rest is noise.
    push: inner product with the gradient of accuracy, divided by that of the reference.
    """

    cosine: np.ndarray
    minibatch: np.ndarray
    share: np.ndarray
    push: np.ndarray


def leave_one_out(correct: np.ndarray, problems: np.ndarray) -> np.ndarray:
    """Verdict of each trace minus the mean verdict of the other traces of its problem: correct [N] in {0, 1} -> [N] float64.

    problems [N] are numbers from 0. Where every problem has one trace, the other problems' mean is the baseline. A problem with
    one trace among larger ones gets 0.
    """
    right = correct.astype(np.float64)
    counts, sums = np.bincount(problems), np.bincount(problems, right)
    if counts.max(initial=0) <= 1:
        return right - (right.sum() - right) / max(1, len(right) - 1)
    others = counts[problems] - 1
    return np.where(others > 0, right - (sums[problems] - right) / np.maximum(others, 1), 0.0)


def all_but_one(blocks: int) -> np.ndarray:
    """How often each block is taken, [1 + M, M]: once each, then all but one of them in turn, for a jackknife."""
    return np.concatenate([np.ones((1, blocks), np.int64), 1 - np.eye(blocks, dtype=np.int64)])


def estimates(products: Products, taken: np.ndarray) -> Estimates:
    """The figures on each choice of blocks, taken [R, M]. A block that is drawn twice is never multiplied with itself.

    With x the mean of cross, q that of own and r, p those of the reference, over pairs of different blocks: cosine
    x / r sqrt(p / q), share q / mean |g|^2. Push is x / r of `along`. All of a cosine comes from the same traces, because noise
    that x and q share cancels: with x of whole blocks and q of parts the error was 2 to 5 times as large. A block's cosine
    <g_b, r_b> / (|g_b| |r|) takes r_b, the mean reference of the *other* blocks, and |r| from `along`.
    """
    draws, diagonal = taken.astype(np.float64), np.einsum("kmm->km", products.own)
    total = draws.sum(1)
    pairs = (total**2 - (draws**2).sum(1))[:, None]

    def between(matrices: np.ndarray) -> np.ndarray:
        """Mean over pairs of different blocks: [K, M, M] -> [R, K]."""
        everything = np.einsum("rm,kmn,rn->rk", draws, matrices, draws, optimize=True)
        return (everything - np.einsum("rm,kmm->rk", draws**2, matrices)) / pairs

    with np.errstate(invalid="ignore", divide="ignore"):
        product, square, along = between(products.cross), between(products.own), between(products.along)
        reference, whole = (np.where(found[:, :1] > 0, found[:, :1], np.nan) for found in (product, along))
        square = np.where(square > 0, square, np.nan)
        seen = np.einsum("kmn,rn->rkm", products.cross, draws) - np.einsum("kmm,rm->rkm", products.cross, draws)
        towards = seen / (total[:, None] - draws)[:, None, :] / np.sqrt(diagonal)
        minibatch = np.einsum("rkm,rm->rk", towards, draws) / total[:, None] / np.sqrt(whole)
        mean_norm = np.einsum("rm,km->rk", draws, diagonal) / total[:, None]
        cosine = product / reference * np.sqrt(square[:, :1] / square)
        return Estimates(cosine, minibatch, square / mean_norm, along / whole)


def adamw(flows: np.ndarray, references: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean cosine of AdamW's step with the gradient of accuracy, [K], and the same without each of G parts of the blocks, [K, G].

    flows [K, M, P] are gradients of minibatches, references [M, P] those of accuracy. The step of the minibatches outside a part
    is mean g / (sqrt(mean g^2) + eps), elementwise. The part's own references tell where it points. Its norm has its noise in it.
    G is LEFT_OUT or M. The second result is for a jackknife. NaN: the references have no direction.
    """
    parts = np.array_split(np.arange(len(references)), min(LEFT_OUT, len(references)))
    sizes, means = np.array([len(part) for part in parts]), np.stack([references[part].mean(0) for part in parts])
    between = references.astype(np.float64) @ references.T
    norms = [_norm(between, np.delete(np.arange(len(between)), part)) for part in ([], *parts)]
    own, without = np.zeros(len(flows)), np.zeros((len(flows), len(parts)))
    for place, flow in enumerate(flows):
        sums, squares = (np.add.reduceat(x, np.cumsum(sizes) - sizes) for x in (flow, np.square(flow)))
        for left in range(len(parts)):
            for other in range(left + 1):
                gone = [left] if other == left else [left, other]
                left_over = np.delete(np.arange(len(parts)), gone)  # summed, since a difference of large sums has no digits left
                count = sizes[left_over].sum()
                step = sums[left_over].sum(0) / (count * (np.sqrt(squares[left_over].sum(0) / count) + eps))
                found = means[gone] @ step / max(float(np.linalg.norm(step)), 1e-30)
                if other == left:
                    own[place] += found[0] / len(parts)
                else:
                    without[place, [other, left]] += found / (len(parts) - 1)
    return own / norms[0], without / norms[1:]


def _norm(products: np.ndarray, kept: np.ndarray) -> float:
    """Norm of an expectation, from products [M, M] of its samples: those of different ones among `kept`. NaN where it is none."""
    square = (products[np.ix_(kept, kept)].sum() - products[kept, kept].sum()) / (len(kept) * (len(kept) - 1))
    return float(np.sqrt(square)) if square > 0 else float("nan")


def in_minibatch(share: np.ndarray, measured: float, wanted: float) -> np.ndarray:
    """The signal's share in the squared norm of a gradient of `wanted` traces, from that of `measured` traces.

    The noise of a mean falls as 1 / n: with s the share, 1 / (1 + (1 / s - 1) measured / wanted).
    """
    with np.errstate(divide="ignore"):
        return np.asarray(1 / (1 + (1 / share - 1) * measured / wanted))


def sums_by_class(values: np.ndarray, classes: np.ndarray, problems: np.ndarray, num_classes: int) -> np.ndarray:
    """Sums over the tokens of each problem and class, and of each problem: [N, C + 1].

    values [tokens], such as weight x alignment; classes [tokens] from 0 (negative: in the last column alone); problems [tokens]
    from 0.
    """
    size, columns = int(problems.max(initial=-1)) + 1, num_classes + 1
    known = classes >= 0
    cells = np.bincount(problems[known] * columns + classes[known], values[known].astype(np.float64), size * columns)
    found = cells.reshape(size, columns)
    found[:, -1] = np.bincount(problems, values.astype(np.float64), size)
    return found
