"""How many engines a pool should have. The answer is a pure function of the waiting batches, the bounds and the past need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """The fewest and the most engines that a pool may have."""

    least: int
    most: int


@dataclass(frozen=True)
class Sizing:
    """The number of engines that a pool aims at, and since when it has needed more or fewer.

    Times are seconds of the caller's clock. `crowded_since`: the pool has needed more engines since then. `spare_since`: it has
    needed fewer since then, and `spare_need` is the most that it needed in that time. None: it does not.
    """

    target: int
    crowded_since: float | None = None
    spare_since: float | None = None
    spare_need: int = 0


@dataclass(frozen=True)
class Pace:
    """How long a pool must need more engines before it grows, and fewer before it shrinks; in seconds."""

    grow_after_s: float
    shrink_after_s: float


def resize(state: Sizing, batches: int, per_engine: int, bounds: Bounds, pace: Pace, now: float) -> Sizing:
    """The sizing at time `now`. `batches` are those that wait and those in engines; an engine holds up to `per_engine`.

    New bounds hold at once. The pool grows when it has needed more engines for `grow_after_s`; an empty pool grows at once.
    It shrinks when it has needed fewer for `shrink_after_s`, to the most that it needed in that time.
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
