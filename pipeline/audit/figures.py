"""The figures of an audit: of each weighting with intervals, and where its push comes from by regime, decile and true class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pipeline.audit.tokens import Tokens
from pipeline.contract import Regime
from pipeline.evidence.intervals import Estimate, jackknife, of_part, of_parts, of_signal, quantile, with_signal
from pipeline.method import directions as maths
from pipeline.method import regimes, relabel
from pipeline.problems import worlds
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import Round

STEP = "adamw"  # cosine of AdamW's step
LONGER = "longer"  # the gradient of the mean length, with the baseline of the reference
DECILES = relabel.NUM_DECILES
FREE = (-np.inf, np.inf)
BOUNDS = dict.fromkeys(("cosine", "minibatch", "batch_cosine", "averaged_cosine", STEP, LONGER), (-1.0, 1.0))
SIGNALS = ("share", "batch_share")


def points(
    names: list[str], products: maths.Products, sizes: tuple[float, int], beta: float, lengths: maths.Products
) -> list[dict[str, Any]]:
    """Figures of each weighting with 95 % intervals over blocks, and their differences from the first audited objective.

    averaged_cosine: of the first moment of AdamW. With `beta` it has the noise of (1 + beta) / (1 - beta) minibatches' mean.
    push: along the gradient of accuracy, as a multiple of the reference's. A weighting without a direction of its own has one.
    longer: cosine with the gradient of the mean length. `lengths` are the products with that gradient, its own first.
    """
    taken = maths.all_but_one(products.own.shape[1])
    drawn = maths.estimates(products, taken)
    in_block, batch = sizes
    share = maths.in_minibatch(drawn.share, in_block, batch)
    shown = {"cosine": drawn.cosine, "minibatch": drawn.minibatch, "share": drawn.share}
    averaged = maths.in_minibatch(drawn.share, in_block, batch * (1 + beta) / (1 - beta))
    shown |= {"batch_share": share, "batch_cosine": drawn.cosine * np.sqrt(share)}
    shown |= {"averaged_cosine": drawn.cosine * np.sqrt(averaged), "push": drawn.push}
    shown |= {LONGER: maths.estimates(lengths, taken).cosine[:, 1:]}
    found = []
    for place, name in enumerate(names):
        figures = {key: _interval(key, values[0, place], values[1:, place]) for key, values in shown.items()}
        figures["batch_cosine"] = with_signal(figures["batch_cosine"], figures["batch_share"])
        signal = of_signal(averaged[0, place], averaged[1:, place])
        figures["averaged_cosine"] = with_signal(figures["averaged_cosine"], signal)
        gaps = {key: values[:, place] - values[:, 1] for key, values in shown.items()} if place > 1 else {}
        differences = {key: of_parts(values[0], values[1:]) for key, values in gaps.items()}
        found.append({"name": name, **figures, "difference": differences})
    return found


def _interval(key: str, value: float, without: np.ndarray) -> Estimate | None:
    """A figure with its interval over blocks, from its values without each of them."""
    return of_signal(value, without) if key in SIGNALS else jackknife(value, without, BOUNDS.get(key, FREE))


def together(gap: Mapping[str, float] | None, blocks: int, tests: int) -> dict[str, float] | None:
    """A difference whose 95 % interval over blocks holds for so many tests together (Bonferroni), with the half of its width."""
    if gap is None:
        return None
    times = quantile(blocks - 1, 1 - 0.025 / tests) / quantile(blocks - 1)
    low, high = (gap["value"] + (gap[end] - gap["value"]) * times for end in ("low", "high"))
    return {"value": gap["value"], "low": low, "high": high, "half": (high - low) / 2}


def add_steps(found: list[dict[str, Any]], flows: np.ndarray, references: np.ndarray, eps: float) -> None:
    """Add the cosine of AdamW's step to the figures of each weighting, and its difference from the first audited objective."""
    values, without = maths.adamw(flows, references, eps)
    for place, (point, value, left) in enumerate(zip(found, values, without, strict=True)):
        point[STEP] = jackknife(value, left, BOUNDS[STEP])
        if place > 1:
            point["difference"][STEP] = jackknife(value - values[1], left - without[1])


class Kind(NamedTuple):
    """One way to class tokens: its name, the names of the classes, and the class of every token [tokens]; -1 is none."""

    name: str
    classes: tuple[str, ...]
    codes: np.ndarray


def kinds(work: Round, tokens: Tokens) -> list[Kind]:
    """Classes by regime, by decile of the teacher's entropy, and by true class where the source knows it."""
    entropy = tokens.traces.teacher_entropy.take(tokens.rows)
    found = [Kind("regime", Regime.NAMES, _regimes(work, tokens, entropy))]
    found.append(Kind("decile", tuple(str(1 + place) for place in range(DECILES)), relabel.decile(entropy)))
    return found if tokens.classes is None else [*found, Kind("class", worlds.CLASSES, tokens.classes)]


def classes(
    work: Round, tokens: Tokens, into: list[Kind], names: list[str], pushed: list[np.ndarray], each: dict[str, Any]
) -> dict[str, Any]:
    """Where the push comes from: its shares by regime, decile and true class, for each weighting.

    pushed: what each token adds to the push of each weighting, K x [tokens]. A push away from accuracy has no shares.
    each: figures of the reference's gradient on the tokens of one class alone, by kind.
    """
    problems = np.repeat(tokens.problems, tokens.lengths)
    found: dict[str, Any] = {"regimes": list(Regime.NAMES), "each": each}
    if tokens.classes is not None:
        found |= {"names": list(worlds.CLASSES), "labels": _labels(work, tokens, into[0].codes)}
    for kind in into:
        codes, count = kind.codes, len(kind.classes)
        found[kind.name] = {"tokens": np.bincount(codes[codes >= 0], minlength=count) / len(codes)}
        for name, values in zip(names, pushed, strict=True):
            *parts, whole = maths.sums_by_class(values, codes, problems, count).T
            found[kind.name][name] = [of_part(part, whole) if whole.mean() > 0 else None for part in parts]
    return found


def _labels(work: Round, tokens: Tokens, regime: np.ndarray) -> dict[str, Any]:
    """Whether the dials and the regimes do what they say, by true class.

    Per class: teacher entropy and its least value within the window ahead, log p_T - log p_S and its absolute value (delta), all
    means in nats. Per regime: precision and recall for the class it names.
    """
    assert tokens.classes is not None
    entropy = tokens.traces.teacher_entropy.take(tokens.rows)
    offsets = np.concatenate([[0], np.cumsum(tokens.lengths)])
    ahead = regimes.lookahead_min(entropy, offsets, work.run.profile.window)
    signals = {"entropy": entropy, "lookahead": ahead, "log_ratio": tokens.log_ratio, "delta": np.abs(tokens.log_ratio)}
    by_class, scored = {}, {}
    for code, name in enumerate(worlds.CLASSES):
        here = tokens.classes == code
        by_class[name] = {"tokens": int(here.sum()), **{key: _mean(values[here]) for key, values in signals.items()}}
    for label, name in (("fork", "fork"), ("pivot", "pivot"), ("lock", "filler")):
        scored[label] = {"class": name, **worlds.scores(regime, tokens.classes, Regime.NAMES.index(label), name)}
    return {"by_class": by_class, "regimes": scored}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _regimes(work: Round, tokens: Tokens, entropy: np.ndarray) -> np.ndarray:
    """Regime of every token under the run's settings, int8 [N]; -1 when the round has no common scale."""
    scope, settings = Inventory(work).scope, work.run.profile
    if scope is None:
        return np.full(len(entropy), -1, np.int8)
    offsets = np.concatenate([[0], np.cumsum(tokens.lengths)])
    scale = regimes.threshold_scale(scope.peak, scope.vocab_size, settings, work.run.label)
    return regimes.regimes(entropy, regimes.lookahead_min(entropy, offsets, settings.window), offsets, scale, settings)
