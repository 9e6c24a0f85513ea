"""The columns of a source that a recipe reads: their names, and a check that the source has them."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.config import Source
from pipeline.errors import SourceError, nearest


def columns_of(source: Source) -> list[str]:
    """Names of the columns to read, each once: problem, answer, and where they are named solution and teacher."""
    return [name for name in dict.fromkeys((source.problem, source.solution, source.answer, source.teacher)) if name]


def check_columns(source: Source, known: Iterable[str], where: str) -> None:
    """Raise SourceError for the first column to read that is not in `known`; `where` names the file or the source."""
    names = sorted(known)
    for role in ("problem", "solution", "answer", "teacher"):
        column = getattr(source, role)
        if column and column not in names:
            hint = nearest(column, names, f"Set source.{role} to the column that holds it", f"Set source.{role}={{}}?")
            raise SourceError(f"has no column '{column}'; there are: {', '.join(names)}", where, hint)
