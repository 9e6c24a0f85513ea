"""Worlds with dials: a task whose traces have forks, pivots, filler and style, each as many as its dials say.

A problem is three choices between two digits, `37?42!91?`. The larger digit is right. After `?` the choice is a *pivot*: both
models are unsure there, the reference helps, and certain tokens follow. After `!` it is easy. A trace has a step for each choice:

    ok,abcqt=7:7;abcps=4:4;ok,abcqq=9:9#749

    ok,       a remark that nobody needs
    abc       filler: the same letters every time (L of them)
    qt        a fork: F letters, each any of `pqrstu`, whatever the reference says
    =7:7;     the choice, and certain tokens

A stretch of forks is sustained only where it has more letters than the window of the lookahead. A shorter one looks like pivots.

Style S is what the sight of the reference does to a writer beyond being right. It leaves remarks out, and it prefers the letters
`pqr` in forks. With `early` E it also skips steps: a trace may name its answer after any step, `ok,abcqt=7:7#749`. The choices
that are left are then made there. The dials stand in the source: `tiny-worlds:forks=2,pivots=2,filler=3,style=0.5,early=0`.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass

import numpy as np

from pipeline.errors import SettingError, nearest

KIND = "tiny-worlds"
STEPS = 3
REMARK = "ok,"
FILLER = "abcdefghij"
FORK = "pqrstu"
ANSWER_PATTERN = r"#(\d+)$"
CLASSES = ("filler", "fork", "pivot", "style", "choice", "other")  # a token's class is its place here
DECIDES = ("pivot", "choice")  # whether an answer is right depends on tokens of these classes alone
TEST_SHARE = 10  # per cent of all problems that are held out


@dataclass(frozen=True)
class Habits:
    """Chances in [0, 1] of a writer: the larger digit at a pivot and at an easy choice, a remark before a step.

    tilt in [0, 1]: how much more than half of the fork letters are of the first half of FORK. early: the answer after a step
    that is not the last.
    """

    pivot: float
    choice: float
    remark: float
    tilt: float
    early: float = 0.0


@dataclass(frozen=True)
class World:
    """The dials. forks, filler: letters in each step. pivots: unsure choices among the three. style, early: from 0 to 1.

    With early 0 no trace of the world skips a step, whoever writes it.
    """

    forks: int = 2
    pivots: int = 2
    filler: int = 3
    style: float = 0.5
    early: float = 0.0

    @property
    def unaided(self) -> Habits:
        """The habits of a writer who does not see the reference."""
        return Habits(pivot=0.6, choice=0.9, remark=0.5, tilt=0.0, early=_EARLY if self.early else 0.0)

    @property
    def aided(self) -> Habits:
        """The habits of a writer who sees the reference: it is right more often, and style changes what does not matter."""
        early = _EARLY + (0.9 - _EARLY) * self.early if self.early else 0.0
        return Habits(pivot=0.8, choice=0.97, remark=0.5 * (1 - 0.9 * self.style), tilt=0.9 * self.style, early=early)


_DIALS: dict[str, tuple[type, float]] = {
    "forks": (int, 6),
    "pivots": (int, STEPS),
    "filler": (int, len(FILLER)),
    "style": (float, 1),
    "early": (float, 1),
}
_EARLY = 0.1  # chance of a writer without the reference to name the answer after a step, in a world where that happens


def read_world(text: str) -> World:
    """The world of `forks=2,pivots=1,filler=3,style=0.5`; a dial that is left out has its default.

    Raises SettingError for another dial, a dial that is given twice, and a value out of range.
    """
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sep, value = (piece.strip() for piece in part.partition("="))
        if name not in _DIALS or not sep or name in found:
            hint = nearest(name, _DIALS, "Write tiny-worlds:forks=2,pivots=2,filler=3,style=0.5,early=0")
            raise SettingError(f"'{part}' is no dial with one value", "source.uri", hint)
        kind, most = _DIALS[name]
        try:
            number = kind(value)
        except ValueError:
            number = -1
        if not 0 <= number <= most:
            what = "a whole number" if kind is int else "a number"
            raise SettingError(f"{name} is '{value}'", "source.uri", f"Give {what} from 0 to {most:g}")
        found[name] = number
    return World(**found)  # type: ignore[arg-type]  # every dial has its own type


def problem(index: int, seed: int, split: str, world: World) -> dict[str, str]:
    """Problem `index` of a split ("train" or "test") in the order of `seed`: its problem, solution and answer.

    The splits share no problem. Raises SettingError for another split.
    """
    if split not in {"train", "test"}:
        raise SettingError(f"a tiny world has no split '{split}'", "source.split", "Use 'train' or 'test'")
    rng = random.Random(f"{seed}/{split}/{index}")
    while True:
        unsure = set(rng.sample(range(STEPS), world.pivots))
        pairs = ["".join(map(str, rng.sample(range(1, 10), 2))) for _ in range(STEPS)]
        text = "".join(pair + ("?" if step in unsure else "!") for step, pair in enumerate(pairs))
        if (zlib.crc32("".join(pairs).encode()) % 100 < TEST_SHARE) == (split == "test"):
            break
    answer = "".join(max(pair) for pair in pairs)
    return {"problem": text, "solution": ";".join(answer) + f"#{answer}", "answer": answer}


def trace(text: str, rng: random.Random, world: World, habits: Habits) -> str:
    """A response of a writer with these habits to a problem. The warm start trains on such traces."""
    parts: list[str] = []
    picks: list[str] = []
    is_early = False
    for pair, mark in _choices(text):
        right = rng.random() < (habits.pivot if mark == "?" else habits.choice)
        pick = max(pair) if right else min(pair)
        is_early = is_early or (bool(parts) and habits.early > 0 and rng.random() < habits.early)
        if is_early:
            picks.append(pick)
            continue
        remark = REMARK if rng.random() < habits.remark else ""
        fork = "".join(rng.choice(FORK[:3] if rng.random() < (1 + habits.tilt) / 2 else FORK[3:]) for _ in range(world.forks))
        parts.append(f"{remark}{FILLER[: world.filler]}{fork}={pick}:{pick}")
        picks.append(pick)
    return ";".join(parts) + "#" + "".join(picks)


def token_classes(problem_text: str, response: str, world: World) -> list[int]:
    """The true class of every character of a response, as places in CLASSES.

    The character where a remark may begin is `style`, remark or not. So is the one that goes on or names the answer early. The
    picked digit is `pivot` or `choice`. From the first character on that no trace of this world can have there, all are `other`:
    so a named answer repeats the picks of its steps.
    """
    found: list[str] = []
    picks: list[tuple[str, str]] = []
    choices = _choices(problem_text)
    for step, (pair, mark) in enumerate(choices):
        is_last = step + 1 == len(choices)
        ending = ("#", "filler") if is_last else (";#", "style") if world.early else (";", "filler")
        slots = _slots(pair, mark, ending, world)
        if response.startswith(REMARK, len(found)):
            found += ["style"] * len(REMARK)
        else:
            slots[0] = (slots[0][0], "style")
        if not _walk(found, response, slots):
            break
        picks.append((response[len(found) - 2], "filler"))  # the copied digit
        if response[len(found) - 1] == "#":
            _walk(found, response, picks + [_pick(*one) for one in choices[step + 1 :]])
            break
    found += ["other"] * (len(response) - len(found))
    return [CLASSES.index(kind) for kind in found]


def _slots(pair: str, mark: str, ending: tuple[str, str], world: World) -> list[tuple[str, str]]:
    """What may stand at each place of a step, and its class. "" is the character before the last one: the digit is copied."""
    letters = [(letter, "filler") for letter in FILLER[: world.filler]] + [(FORK, "fork")] * world.forks
    return [*letters, ("=", "filler"), _pick(pair, mark), (":", "filler"), ("", "filler"), ending]


def _pick(pair: str, mark: str) -> tuple[str, str]:
    return pair, "pivot" if mark == "?" else "choice"


def _walk(found: list[str], response: str, slots: list[tuple[str, str]]) -> bool:
    """Add the classes of the characters that fit. Returns whether all slots were filled."""
    for allowed, kind in slots:
        place = len(found)
        if place >= len(response) or response[place] not in (allowed or response[place - 2]):
            return False
        found.append(kind)
    return True


def _choices(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(\d\d)([?!])", text)


def scores(regimes: np.ndarray, classes: np.ndarray, regime: int, kind: str) -> dict[str, float | None]:
    """Precision and recall of one regime as a sign of one true class, of tokens [N]. None where no token counts."""
    said, there = regimes == regime, classes == CLASSES.index(kind)
    hit = float((said & there).sum())
    return {
        "precision": hit / float(said.sum()) if said.any() else None,
        "recall": hit / float(there.sum()) if there.any() else None,
    }
