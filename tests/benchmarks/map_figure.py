"""The map as a picture: differences in accuracy over each dial, and what an audit saw beside what training did.

python -m tests.benchmarks.map_figure        # map/map.svg, from the files of map/
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from pipeline.evidence.intervals import Tested, over_seeds
from pipeline.problems.worlds import World
from tests.benchmarks.bench_map import RESULTS, ROUNDS, WORLDS, coefficient, design, gaps, read

WIDTH, HEIGHT, LEFT, TOP, SIZE = 1120, 330, 60, 46, 240
STEP = 340  # from one panel to the next
COLORS = {
    "grpo": "#7a7a7a",
    "egrsd": "#0b6e8f",
    "cl_egrsd": "#58a618",
    "position": "#b8860b",
    "grpo+top_entropy:0.2": "#c0392b",
    "inverted": "#8e44ad",
    "shuffled": "#d98cb3",
}


class Scale(NamedTuple):
    """Values from `low` to `high` on a stretch of `SIZE` units that begins at `start`; `sign` -1 points up."""

    low: float
    high: float
    start: float
    sign: int = 1

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + SIZE * (share if self.sign > 0 else 1 - share), 1)

    def ticks(self) -> list[float]:
        """Round values within the scale, four to eight of them."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** np.floor(np.log10(rough))
        step = next(power * part for part in (1, 2, 5, 10) if power * part >= rough)
        return [round(step * place, 6) for place in range(int(np.ceil(self.low / step)), int(np.floor(self.high / step)) + 1)]


def scale(values: Sequence[float], start: float, sign: int = 1) -> Scale:
    """A scale that holds all values and 0, with a margin of a twelfth."""
    low, high = min([0.0, *values]), max([0.0, *values])
    margin = (high - low or 1.0) / 12
    return Scale(low - margin, high + margin, start, sign)


def line(one: tuple[float, float], other: tuple[float, float], color: str = "#333", width: float = 1.0, dash: str = "") -> str:
    """A straight line between two places."""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    (x1, y1), (x2, y2) = one, other
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" stroke-width="{width}"{dashed}/>'


def words(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    """A line of text."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def dot(x: float, y: float, color: str, says: str) -> str:
    """A point, which says what it is under the mouse."""
    return f'<circle cx="{x}" cy="{y}" r="3.5" fill="{color}"><title>{escape(says)}</title></circle>'


def frame(across: Scale, up: Scale, title: str, below: str, beside: str) -> list[str]:
    """Axes, ticks, the line of zero, and words of a panel."""
    left, low = across.start, TOP + SIZE
    drawn = [words(left + SIZE / 2, TOP - 22, title, more='font-weight="bold"'), words(left + SIZE / 2, low + 34, below)]
    drawn += [words(left - 4, TOP - 6, beside, "start", 'fill="#555"'), line((left, low), (left + SIZE, low))]
    drawn += [line((left, TOP), (left, low)), line((left, up(0)), (left + SIZE, up(0)), "#999", 1, "3 3")]
    for value in across.ticks():
        drawn += [line((across(value), low), (across(value), low + 4)), words(across(value), low + 16, f"{value:g}")]
    for value in up.ticks():
        drawn += [line((left - 4, up(value)), (left, up(value))), words(left - 7, up(value) + 4, f"{value:g}", "end")]
    return drawn


class Asked(NamedTuple):
    """A hypothesis: which difference has which slope over a dial. place: that of the slope in `design`."""

    better: str
    worse: str
    below: str
    dial: Callable[[World], float]
    place: int


HYPOTHESES = {
    "H1": Asked("egrsd", "rlsd", "forks x style", lambda world: world.forks * world.style, 1),
    "H2": Asked("cl_egrsd", "egrsd", "pivots", lambda world: float(world.pivots), 2),
}


def slope(left: float, name: str, found: dict[str, np.ndarray]) -> list[str]:
    """The panel of a hypothesis: a difference in accuracy over a dial, in points, with intervals and the slope that was tested.

    found: the answers of each objective, [W, S, N].
    """
    asked = HYPOTHESES[name]
    difference, color = 100 * (found[asked.better] - found[asked.worse]), COLORS[asked.better]
    worlds = WORLDS[: len(difference)]
    x = np.array([asked.dial(world) for world in worlds])
    each, fitted = [over_seeds(part) for part in difference], coefficient(difference, design(worlds)[asked.place])
    mean, middle = float(np.mean([one.value for one in each])), float(x.mean())
    across = scale(list(x), left)
    up = scale([value for one in each for value in (one.low, one.high)], TOP, -1)
    drawn = frame(across, up, f"{name}: {asked.better} less {asked.worse}", asked.below, "points, 95 %")
    ends = [(across(at), up(mean + fitted.value * (at - middle))) for at in (float(x.min()), float(x.max()))]
    drawn.append(line(ends[0], ends[1], color, 2))
    spread = (across.high - across.low) / 90
    for number, (world, at, one) in enumerate(zip(worlds, x, each, strict=True)):
        aside = across(at + spread * ((number % 5) - 2))  # worlds with one value of the dial stand beside each other
        drawn.append(line((aside, up(one.low)), (aside, up(one.high)), color))
        drawn.append(dot(aside, up(one.value), color, f"{world}: {one.value:+.1f} [{one.low:+.1f}, {one.high:+.1f}]"))
    return [*drawn, words(left + SIZE, TOP + 12, told(fitted), "end", f'fill="{color}"')]


def told(fitted: Tested) -> str:
    """A slope with its interval."""
    return f"slope {fitted.value:+.2f} [{fitted.low:+.2f}, {fitted.high:+.2f}]"


def predicted(left: float, seen: np.ndarray, trained: np.ndarray, names: list[str]) -> list[str]:
    """One panel: how far an objective's batch cosine lies above that of `rlsd` [W, K], and its accuracy [W, K] in points."""
    across, up = scale(list(seen.ravel()), left), scale(list(trained.ravel()), TOP, -1)
    title = f"Audit of round {ROUNDS // 2} and training, both against rlsd"
    drawn = frame(across, up, title, "batch cosine", "points")
    for place, name in enumerate(names):
        drawn += [dot(across(a), up(t), COLORS[name], name) for a, t in zip(seen[:, place], trained[:, place], strict=True)]
        drawn.append(dot(left + SIZE + 14, TOP + 8 + 16 * place, COLORS[name], name))
        drawn.append(words(left + SIZE + 22, TOP + 12 + 16 * place, name.replace("grpo+", ""), "start"))
    return drawn


def draw(results: Path, worlds: list[World]) -> str:
    """The picture, as SVG."""
    found, audits = read(results, worlds)
    names = [name for name in audits[0][str(ROUNDS // 2)][0] if name != "rlsd"]
    seen = gaps(audits, names, ROUNDS // 2, "batch_cosine")
    trained = 100 * np.stack([(found[name] - found["rlsd"]).mean((1, 2)) for name in names], axis=1)
    drawn = [
        *slope(LEFT, "H1", found),
        *slope(LEFT + STEP, "H2", found),
        *predicted(LEFT + 2 * STEP, seen, trained, names),
    ]
    look = 'font-family="system-ui, sans-serif" font-size="11" fill="#222"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {look}>'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', *drawn, "</svg>", ""])


if __name__ == "__main__":
    (RESULTS / "map.svg").write_text(draw(RESULTS, WORLDS))
