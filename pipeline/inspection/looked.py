"""What a run would make of a source, said before anything starts: its columns with an example of each, and rejected rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from pipeline.config import Run
from pipeline.contract import Place
from pipeline.fit.machine import Line
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.problems.problem import Problem
from pipeline.problems.sources import ProblemSet, named
from pipeline.problems.splits import is_one_file
from pipeline.problems.survey import COSTS
from pipeline.stages.prompts import prompts, why_unusable
from pipeline.stages.rollout import imported

MOST_ROWS = 1024  # first rows that are looked at
_SHOWN = 60  # characters of an example
_NUMBERS = 5  # row numbers that are named for each reason
_AT_ONCE = 128
CARRIED = "kept with each row, for rewards of your own"


@dataclass
class _Rejected:
    """Rows that cannot be used: how many for each reason, with the numbers and the detail of the first."""

    counts: Counter[str] = field(default_factory=Counter)
    rows: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    details: dict[str, str] = field(default_factory=dict)

    def count(self, row: int, reason: str, detail: str) -> None:
        """Count one row, or one trace of it."""
        self.counts[reason] += 1
        self.details.setdefault(reason, detail)
        if row not in self.rows[reason]:
            self.rows[reason].append(row)

    def lines(self, total: int, what: str) -> list[Line]:
        """A finding for each reason, the commonest first. Errors when nothing is left."""
        level = "error" if self.counts.total() >= total else "warning"
        lines = []
        for reason, count in self.counts.most_common():
            rows = self.rows[reason]
            numbers = ", ".join(map(str, rows[:_NUMBERS])) + (", ..." if len(rows) > _NUMBERS else "")
            lines.append(Line(level, "rejected", f"{count} of {total} {what}, {reason} (row {numbers}): {self.details[reason]}"))
        if lines and level == "warning" and what == "rows":
            lines.append(Line(level, "rejected", COSTS))
        return lines or [Line("ok", "rejected", f"none of {total} {what}")]


def look(problems: ProblemSet, run: Run | None) -> list[Line]:
    """What the first MOST_ROWS rows of a source tell. With `run` their prompts and imported traces are made too, without engines.

    Rows are those of the file, from 0. Raises ModelError when the tokenizer cannot be loaded.
    """
    lacks = problems.shape.lacks
    if run is None:
        problems = problems.without_solutions()
    rows = problems.rows(range(min(MOST_ROWS, len(problems))))
    size = f"{len(problems)} of {problems.total}" if len(problems) < problems.total else str(problems.total)
    looked = f"the first {len(rows)} are looked at{_counted(problems)}"
    lines = [Line("ok", "source", f"{named(problems.source)}: {size} rows; {looked}")]
    lines += _columns(problems, rows, lacks)
    rejected, usable = _Rejected(), list[Problem]()
    for row in rows:
        reject, detail = (row.reject, row.detail) if run is None else why_unusable(row, run)
        if reject is None:
            usable.append(row)
        else:
            rejected.count(problems.source.row_of(row.index), str(reject), detail)
    if run is None:
        return [*lines, *rejected.lines(len(rows), "rows")]
    traces = bool(run.source.response)
    made = _made(usable, run, rejected)
    rejected_rows = rejected.counts.total() - made
    total = len(rows) if not traces else rejected_rows + (len(rows) - rejected_rows) * run.writers.count("import")
    return [*lines, *rejected.lines(total, "traces" if traces else "rows")]


def _made(rows: list[Problem], run: Run, rejected: _Rejected) -> int:
    """Count the rows, or their imported traces, that cannot become prompts and traces of the run. Returns how many."""
    tokenizer, before = tokenizer_of(run.model), rejected.counts.total()
    size = run.writers.count("import") or 1
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        table = prompts(part, run, tokenizer)
        if run.source.response:
            table = imported(table, run, Place(""))
        told = zip(table["reject_reason"].to_pylist(), table["reject_detail"].to_pylist(), strict=True)
        for place, (reason, detail) in enumerate(told):
            if reason is not None:
                rejected.count(run.source.row_of(part[place // size].index), reason, detail or "")
    return rejected.counts.total() - before


def _counted(problems: ProblemSet) -> str:
    """How rows are numbered, where somebody would look for one in a file."""
    source = problems.source
    lines = is_one_file(source.uri) and source.uri.endswith((".jsonl", ".ndjson"))
    return "; row 0 is the first line of the file" if lines else f", from row {source.skip}"


def _columns(problems: ProblemSet, rows: list[Problem], lacks: str) -> list[Line]:
    """What each column is, with an example. `lacks`: why there is no column of solutions."""
    shape, first = problems.shape, next((row for row in rows if row.reject is None), rows[0])
    lines = [Line("ok", "problem", f"{_named(shape.problem, rows)}: {_example(first.problem)}")]
    if shape.solution:
        lines.append(Line("ok", "solution", f"column '{shape.solution}': {_example(first.solution)}"))
    elif lacks:
        lines.append(Line("warning", "solution", f"{lacks}. A teacher that sees a reference needs one"))
    lines.append(Line("ok", "answer", f"column '{shape.answer}': {_example(first.answer)}"))
    if shape.response:
        most = max((len(row.imported or ()) for row in rows), default=0)
        example = _example(first.imported[0] if first.imported else None)
        lines.append(Line("ok", "response", f"column '{shape.response}', up to {most} imported traces a row: {example}"))
    lines += [Line("ok", "found by looking", text) for text in shape.found]
    if shape.other:
        largest = max((len(row.extra.encode()) for row in rows if row.extra), default=0)
        lines.append(Line("ok", "carried", f"{', '.join(shape.other)}: {CARRIED}, at most {largest} bytes a row"))
    left_out = Counter(name for row in rows for name in row.left_out)
    if left_out:
        listed = ", ".join(f"{name} ({count} rows)" for name, count in left_out.most_common(4))
        lines.append(Line("warning", "carried", f"too large for source.carry_bytes {problems.source.carry_bytes}: {listed}"))
    return lines


def _named(column: str, rows: list[Problem]) -> str:
    """The column of problems, and whether it holds conversations."""
    several = sum(row.messages is not None for row in rows)
    return f"column '{column}'" + (f", conversations of several turns in {several} rows" if several else "")


def _example(text: str | None) -> str:
    """The beginning of a text, as Python writes it."""
    if text is None:
        return "empty"
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")
