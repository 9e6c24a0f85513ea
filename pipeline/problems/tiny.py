"""The tiny arithmetic task.

A problem is a sum of four one-digit terms, `7+4-3+9`. A response works from left to right and puts the answer behind `#`:

    7+4=11;maybe 11-3=9;wait;11-3=8;8+9=17;check 8+9=17#17

The student sees the problem (STUDENT_PROMPT). The privileged teacher sees it with its reference solution (TEACHER_PROMPT). The
tokenizer's chat template puts either of them between `<bos>` and a newline.
"""

from __future__ import annotations

import itertools
import random
import zlib
from dataclasses import dataclass
from functools import lru_cache

from pipeline.errors import SettingError

STUDENT_PROMPT = "{problem}"
TEACHER_PROMPT = "{problem}|{solution}"
ANSWER_PATTERN = r"#(-?\d+)$"
NUM_TERMS = 4
TEST_SHARE = 10  # per cent of all problems that are held out


@dataclass(frozen=True)
class Habits:
    """Chances in [0, 1] that shape the traces of the warm start.

    doubt: a step begins with `maybe`. doubtful_error, plain_error: such a step, or a plain one, has a wrong result. repair: a
    wrong result is corrected after `wait`. check: a right result is followed by a needless `check`.
    """

    doubt: float
    doubtful_error: float
    plain_error: float
    repair: float
    check: float


UNAIDED = Habits(doubt=0.5, doubtful_error=0.5, plain_error=0.04, repair=0.3, check=0.15)
AIDED = Habits(doubt=0.25, doubtful_error=0.2, plain_error=0.02, repair=0.5, check=0.15)
CAREFUL = Habits(doubt=0.2, doubtful_error=0.1, plain_error=0.01, repair=0.95, check=0.15)  # of a teacher of its own


def problem(index: int, seed: int, split: str) -> dict[str, str]:
    """Problem `index` of a split ("train" or "test") in the order of `seed`: its problem, solution and answer.

    Every problem of a split (47k train, 5k test) comes once before one comes again. The splits share no problem. Raises
    SettingError for another split.
    """
    texts = _shuffled(split, seed)
    text = texts[index % len(texts)]
    *_, (_, _, _, total) = steps(text)
    return {"problem": text, "solution": reference_solution(text), "answer": str(total)}


def steps(text: str) -> list[tuple[int, str, int, int]]:
    """The sums of a problem from left to right: (running total before, sign, term, total after)."""
    total, *rest = text.replace("+", " +").replace("-", " -").split()
    running, sums = int(total), []
    for token in rest:
        before, running = running, running + int(token)
        sums.append((before, token[0], int(token[1:]), running))
    return sums


def reference_solution(text: str) -> str:
    """The clean solution of a problem: `7+4=11;11-3=8;8+9=17#17`."""
    done = steps(text)
    return ";".join(f"{before}{sign}{term}={after}" for before, sign, term, after in done) + f"#{done[-1][-1]}"


def verbose_trace(text: str, rng: random.Random, habits: Habits = UNAIDED) -> str:
    """A wordy response to a problem that may be wrong. The warm start trains the tiny reasoner on such traces.

    Steps that begin with `maybe` are often wrong. Some wrong results are repaired after `wait`, the others are carried on.
    """
    parts: list[str] = []
    running = int(text[0])
    for _, sign, term, _ in steps(text):
        asked, truth = f"{running}{sign}{term}", running + term if sign == "+" else running - term
        doubtful = rng.random() < habits.doubt
        wrong = rng.random() < (habits.doubtful_error if doubtful else habits.plain_error)
        running = truth + rng.choice((-2, -1, 1, 2)) if wrong else truth
        parts.append(f"{'maybe ' if doubtful else ''}{asked}={running}")
        if wrong and rng.random() < habits.repair:
            running = truth
            parts += ["wait", f"{asked}={truth}"]
        elif not wrong and rng.random() < habits.check:
            parts.append(f"check {asked}={truth}")
    return ";".join(parts) + f"#{running}"


@lru_cache(maxsize=8)
def _shuffled(split: str, seed: int) -> tuple[str, ...]:
    if split not in {"train", "test"}:
        raise SettingError(f"the tiny task has no split '{split}'", "source.split", "Use 'train' or 'test'")
    digits = "123456789"
    texts = [
        "".join(t) for t in itertools.product(digits, *itertools.repeat([s + d for s in "+-" for d in digits], NUM_TERMS - 1))
    ]
    chosen = [t for t in texts if (zlib.crc32(t.encode()) % 100 < TEST_SHARE) == (split == "test")]
    random.Random(f"{seed}/{split}").shuffle(chosen)
    return tuple(chosen)
