"""The tables that verbs print, with the figures of evaluations and their intervals."""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from jobs.screen.terminal import printable
from pipeline.errors import UserError
from pipeline.evidence.comparison import MEASURES
from pipeline.evidence.evaluation import FIGURES
from pipeline.evidence.intervals import Estimate
from pipeline.problems.sources import in_words
from pipeline.store.files import check_place, replace_local


def aligned(title: str, *columns: str | Column, gap: int = 2, header: bool = True) -> Table:
    """An empty table without lines and with `gap` blanks between columns. Its title is text and no markup."""
    text = escape(printable(title))
    return Table(*columns, title=text, title_justify="left", box=None, padding=(0, gap, 0, 0), show_header=header)


def interval(figure: dict[str, Any], scale: float, signed: bool = False) -> str:
    """A text such as `47.3 [43.0, 51.6]` for a figure of summary.json, times `scale`. JSON has null for infinite values."""
    value, low, high = (math.inf if figure[name] is None else figure[name] for name in ("value", "low", "high"))
    return Estimate(value, low, high).text(scale, signed=signed)


def of_source(name: str, summary: dict[str, Any]) -> Table:
    """The table of one source's summary.json: figures of policies, their differences, verdicts and rejected rows."""
    source = summary["source"]
    asked = f"{name}: {summary['problems']} problems x {summary['samples']} samples of {in_words(source['uri'], source['split'])}"
    title = f"{asked}; mean and 95 % interval over problems"
    policies, changes = summary["policies"], summary["differences"]
    names = [*(f"policy {number}" for number in policies), *(f"{d['policy']} - {d['against']}" for d in changes)]
    table = aligned(title, "", *names)
    figures = [policy["figures"] for policy in policies.values()]
    _add_figures(table, _labels(summary["k"], summary["samples"]), figures, [d["figures"] for d in changes])
    for kind in ("verdicts", "rejected"):
        for reason in sorted({reason for policy in policies.values() for reason in policy[kind]}):
            counts = [str(policy[kind].get(reason, 0)) for policy in policies.values()]
            table.add_row(reason if kind == "verdicts" else f"rejected: {reason}", *counts, *[""] * len(changes))
    gave_up = [str(policy.get("verifier_gave_up", 0)) for policy in policies.values()]
    table.add_row("verifier gave up", *gave_up, *[""] * len(changes))
    return table


def of_macro_mean(macro: dict[str, Any]) -> Table:
    """The table of the mean over sources with equal weights, as pipeline.evidence.asked.macro_mean computes it."""
    names = [f"policy {number}" for number in macro["policies"]]
    names += [f"{number} - {macro['against']}" for number in macro["differences"]]
    table = aligned(f"macro mean over {macro['sources']} sources", "", *names)
    labels = _labels(macro["k"], macro["samples"])
    _add_figures(table, labels, list(macro["policies"].values()), list(macro["differences"].values()))
    return table


def write_csv(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of figures as CSV, one column for each value; nested ones have names with dots. An earlier file is replaced
    once the new one is whole.

    Raises UserError when the file cannot be written.
    """
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(flat)
    with _explained(path):
        replace_local(Path(path), text.getvalue())


def check_csv(path: str) -> None:
    """Raise UserError when `write_csv` could not write a file there. A verb asks before it makes figures for hours."""
    with _explained(path):
        check_place(Path(path))


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # a home that nobody has, and links that lead back to themselves
        cause = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot be written ({cause})", f"--csv {path}", "Name a file that you may write") from error


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one level, with dotted names."""
    flat: dict[str, Any] = {}
    for key, part in value.items():
        if isinstance(part, list | tuple):
            part = dict(enumerate(part))
        flat |= _flat(part, f"{before}{key}.") if isinstance(part, Mapping) else {f"{before}{key}": part}
    return flat


def of_comparison(document: dict[str, Any]) -> Table:
    """The table of compare.json: means over seeds, differences from the baseline, and whether they are beyond noise."""
    settings = document["settings"]
    source = settings["source"]
    problems = f"{settings['problems']} held-out problems of {in_words(source['uri'], source['split'])}"
    title = f"{problems}, {settings['rounds']} rounds; mean over seeds and 95 % interval"
    change = f"- {settings['baseline']}"
    table = aligned(title, Column("objective", no_wrap=True), "seeds", "accuracy, %", change, "", "length, tokens", change, "")
    changes = {(pair["objective"], pair["measure"]): pair for pair in document["pairs"]}
    for row in document["objectives"]:
        cells = [row["objective"], str(len(row["seeds"]))]
        for measure, scale in zip(MEASURES, (100.0, 1.0), strict=True):
            cells.append(interval(row[measure], scale))
            pair = changes.get((row["objective"], measure))
            cells += [interval(pair, scale, signed=True), verdict(pair)] if pair else ["", ""]
        table.add_row(*cells)
    return table


def verdict(pair: dict[str, Any]) -> str:
    """A sentence part that says whether a difference is beyond noise."""
    if pair["beyond_noise"] is None:
        return "one seed: untested"
    return f"{'beyond noise' if pair['beyond_noise'] else 'not beyond noise'} (p {pair['p_holm']:.2g})"


def _labels(k: int, samples: int) -> dict[str, tuple[str, float]]:
    """(label, scale) of each figure: its name in a table, and the factor that it is shown with.

    With one sample per problem pass@1 and maj@1 are avg@1, so these are left out.
    """
    shown = (f"avg@{samples}, %", f"pass@{k}, %", f"maj@{samples}, %", "mean length", "median length")
    scales = (100.0, 100.0, 100.0, 1.0, 1.0, 100.0, 1.0)
    named_ = dict(zip(FIGURES, zip((*shown, "truncated, %", "tokens per correct"), scales, strict=True), strict=True))
    return {name: label for name, label in named_.items() if samples > 1 or name not in ("pass", "maj")}


def _add_figures(
    table: Table, labels: dict[str, tuple[str, float]], figures: list[dict[str, Any]], changes: list[dict[str, Any]]
) -> None:
    """Add one row per label. Each column is a policy of `figures` or a difference of `changes`."""
    for name, (label, scale) in labels.items():
        cells = [interval(column[name], scale) if name in column else "-" for column in figures]
        cells += [interval(column[name], scale, signed=True) if name in column else "-" for column in changes]
        table.add_row(label, *cells)
