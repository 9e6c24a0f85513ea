"""What a source holds, counted before a run starts: rows that cannot be used, control tokens, problems of another source too."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field

from pipeline.contract import Reject
from pipeline.errors import SourceError
from pipeline.notices import NOTICE_S, late
from pipeline.problems.sources import Problem, ProblemSet

MOST_GENERATED = 2048  # rows that are looked at of a task that generates problems
MOST_OTHERS = 4096  # first rows of which the other columns are looked at, since these may be large
_AT_ONCE = 1024
_NAMED = 5  # rows that are named
COSTS = "a row that cannot be used takes a place in each round that asks it, and gives no trace: mend it or take it out"
REMEDY = "Name the columns that hold problem, solution and answer, or mend the rows"


@dataclass
class Survey:
    """Counts over the first rows of a source.

    solutions: whether a row needs a reference solution. rejected: rows that cannot be used, by what they lack. controls: how
    often each control token is spelled, and `spelling` the rows that spell one. problems: how often each problem text stands
    there, by the hash of its normalised form. again: the first rows whose problem an earlier row has. left_out: rows of which a
    column was too large to be carried, by its name. generated: whether a task makes the problems, which may then come again.
    skip: rows of the file that stand before the first one.
    """

    uri: str
    solutions: bool = True
    rows: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    controls: Counter[str] = field(default_factory=Counter)
    spelling: int = 0
    problems: Counter[int] = field(default_factory=Counter)
    again: list[int] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    generated: bool = False
    skip: int = 0

    def count(self, row: Problem, controls: re.Pattern[str] | None) -> None:
        """Count one row. `controls` finds control tokens."""
        self.rows += 1
        without = row.reject == Reject.MISSING_SOLUTION and not self.solutions and row.answer is not None
        if row.reject is not None and not without:
            asked = self.solutions or row.reject != Reject.MISSING_SOLUTION
            self.rejected[row.detail if asked else "it has no answer"] += 1  # nobody asked for its solution
            return
        self.left_out.update(row.left_out)
        spelled = controls.findall(f"{row.messages or row.problem}\n{row.solution or ''}") if controls else []
        self.controls.update(spelled)
        self.spelling += bool(spelled)
        key = hash(_alike(_asked(row)))
        if key in self.problems and len(self.again) <= _NAMED:
            self.again.append(self.skip + row.index)
        self.problems[key] += 1

    def notes(self) -> list[str]:
        """What the person who starts the run should know."""
        notes = []
        notes += [f"note: {said}" for said in (self.lacks(), self.repeats()) if said]
        if self.controls:
            listed = ", ".join(f"{count} {token}" for token, count in self.controls.most_common(4))
            notes.append(f"note: {self.uri}: {self.spelling} of {self.rows} rows spell control tokens, read as text: {listed}")
        if self.left_out:
            listed = ", ".join(f"{name} ({count} rows)" for name, count in self.left_out.most_common(4))
            first = f"among the first {min(self.rows, MOST_OTHERS)} rows"
            notes.append(f"note: {self.uri}: columns too large to be kept for rewards (source.carry_bytes), {first}: {listed}")
        return notes

    def lacks(self) -> str:
        """How many rows cannot be used, and why, in words; "" for none."""
        listed = ", ".join(f"{count} ({detail})" for detail, count in self.rejected.most_common(3))
        return f"{self.uri}: {self.rejected.total()} of {self.rows} rows cannot be used: {listed}" if listed else ""

    def repeats(self) -> str:
        """How many rows have a problem that an earlier row has, in words; "" for none, and for problems that a task makes."""
        again = 0 if self.generated else sum(count - 1 for count in self.problems.values())
        rows = ", ".join(map(str, self.again[:_NAMED])) + (", ..." if again > _NAMED else "")
        said = f"{again} of {self.rows} rows repeat the problem of an earlier row (row {rows}; the first row is 0)"
        return f"{self.uri}: {said}. Such a problem is asked once for each of its rows" if again else ""

    def check(self) -> None:
        """Raise SourceError, with what is lacking most often, when no row can be used."""
        if self.rows and self.rejected.total() == self.rows:
            detail = self.rejected.most_common(1)[0][0]
            raise SourceError(f"none of its {self.rows} rows can be used: {detail}", self.uri, REMEDY)


def survey(problems: ProblemSet, controls: re.Pattern[str] | None, most: int | None = None, solutions: bool = True) -> Survey:
    """Counts over the first `most` rows of a source, or over all of them.

    `solutions`: whether a row needs a reference solution. `controls` finds what a tokenizer takes for control tokens.
    """
    found = Survey(problems.source.uri, solutions, generated=is_generated(problems), skip=problems.source.skip)
    size = min(len(problems), MOST_GENERATED if is_generated(problems) else len(problems), most or len(problems))
    with late(f"survey {found.uri}", f"the {size} rows of {found.uri} have been counted for {NOTICE_S:g} s so far."):
        for start in range(0, size, _AT_ONCE):
            for row in problems.rows(range(start, min(size, start + _AT_ONCE)), others=start < MOST_OTHERS):
                found.count(row, controls)
    return found


def is_generated(problems: ProblemSet) -> bool:
    """Whether a task generates the problems. Its splits share none."""
    return problems.source.uri == "tiny-arithmetic" or problems.source.uri.startswith(("reasoning-gym:", "tiny-worlds:"))


def normal(problem: str) -> str:
    """A problem's text with single blanks and without letter case: problems with the same normal form are the same."""
    return " ".join(problem.split()).casefold()


def _asked(row: Problem) -> str:
    """What a row asks: its problem, or all its turns where the user speaks more than once. A system turn is no part of it."""
    turns = json.loads(row.messages) if row.messages else []
    several = sum(turn["role"] == "user" for turn in turns) > 1
    return (row.messages if several else row.problem) or ""


def _alike(problem: str) -> str:
    """A problem's text as `normal`, with one spelling of characters that Unicode can write in several ways."""
    return normal(unicodedata.normalize("NFC", problem))


def compared(training: Survey, held_out: Survey) -> list[str]:
    """What the person who starts the run should know about training and held-out problems together."""
    notes = []
    if training.uri != held_out.uri:
        where = f"training problems are from {training.uri}, held-out problems from {held_out.uri}"
        notes.append(f"note: {where} (evaluation.source)")
    if shared := overlap(training, held_out):
        notes.append(f"note: {shared}")
    return notes


def overlap(training: Survey, held_out: Survey) -> str:
    """How many held-out problems are training problems too, in words; "" for none."""
    shared = sum(count for key, count in held_out.problems.items() if key in training.problems)
    return f"{shared} of {held_out.rows} held-out problems of {held_out.uri} are training problems too" if shared else ""
