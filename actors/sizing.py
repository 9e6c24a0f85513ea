"""How many engines a pool should have: a pure function of the work there is, with hysteresis."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """The fewest and the most engines of a pool."""

    least: int
    most: int


@dataclass(frozen=True)
class Sizing:
    """The number of engines aimed at, and since when another would have done (seconds of the caller's clock; None: it would not).

    `spare_need` is the most engines that were needed since `spare_since`.
    """

    target: int
    crowded_since: float | None = None
    spare_since: float | None = None
    spare_need: int = 0


@dataclass(frozen=True)
class Pace:
    """Seconds for which more engines must have been wanted before the pool grows, and fewer before it shrinks."""

    grow_after_s: float
    shrink_after_s: float


def resize(state: Sizing, batches: int, per_engine: int, bounds: Bounds, pace: Pace, now: float) -> Sizing:
    """The sizing after a look at `batches`, those that wait and those in engines, of which an engine holds `per_engine`.

    Bounds hold at once. Within them a pool grows to what is needed once that was more than it has for `grow_after_s` (at once
    when it is empty: nothing would be served), and shrinks to the most that was needed in the last `shrink_after_s`.
    """
    need = -(-batches // per_engine)
    wanted = min(max(need, bounds.least), bounds.most)
    target = min(max(state.target, bounds.least), bounds.most)
    if wanted > target:
        since = now if state.crowded_since is None else state.crowded_since
        grow = target == 0 or now - since >= pace.grow_after_s
        return Sizing(wanted) if grow else Sizing(target, crowded_since=since)
    if wanted < target:
        since = now if state.spare_since is None else state.spare_since
        peak = max(wanted, state.spare_need)
        return Sizing(min(peak, target)) if now - since >= pace.shrink_after_s else Sizing(target, None, since, peak)
    return Sizing(target)
