"""sources.json: the problem sources that a run was made with, so that a source which changes meanwhile is noticed.

It has an entry for `source` and one for `evaluation.source`: the source's settings, the hash of its rows, and size and time of
its files. Runs of early versions have no such file. Then the fingerprints in their plans are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config import Run, Source
from pipeline.errors import SourceError
from pipeline.problems.sources import ProblemSet, open_source, stamps
from pipeline.rounds.plan import read_plan
from pipeline.store.directory import Store

SOURCES = "sources.json"
_KINDS = {"source": "rounds", "evaluation.source": "evals"}
ACCEPT = "Put the old file back, use another --run, or pass --accept-changes"


def keep(store: Store, opened: Mapping[str, ProblemSet]) -> None:
    """Write what the open sources are now, by the names of their settings."""
    document = {
        name: {
            "settings": problems.source.model_dump(mode="json"),
            "fingerprint": problems.fingerprint,
            "rows": len(problems),
            "files": stamps(problems.source),
        }
        for name, problems in opened.items()
    }
    if store.read_json(SOURCES) != document:
        store.write_json(SOURCES, document)


def changes(store: Store, opened: Mapping[str, ProblemSet]) -> list[str]:
    """A sentence for each open source whose rows are not those that the run was made with."""
    known = _known(store)
    found = []
    for name, problems in opened.items():
        before, rows = known.get(name, {}), ""
        if "rows" in before and before["rows"] != len(problems):
            rows = f" ({before['rows']} rows before, {len(problems)} now)"
        if before and before["fingerprint"] != problems.fingerprint and _same(before, problems.source):
            found.append(f"{name} {problems.source.uri} has other rows than those the run was made with{rows}")
    return found


def refuse_changes(store: Store, opened: Mapping[str, ProblemSet], accept: bool) -> list[str]:
    """The sentences of `changes` when they are accepted. Raises SourceError for the first one when they are not."""
    found = changes(store, opened)
    if found and not accept:
        raise SourceError("; ".join(found), store.uri, ACCEPT)
    return [f"note: {text}." for text in found]


def look(store: Store, run: Run) -> list[str]:
    """The same sentences without open sources. A source is read only when size or time of one of its files have changed."""
    known, found = _known(store), []
    parts = {"source": run.source} | ({"evaluation.source": run.evaluation.source} if run.evaluation.problems else {})
    for name, source in parts.items():
        before = known.get(name, {})
        if not before.get("files") or not _same(before, source):
            continue
        try:
            if stamps(source) != before["files"]:
                found += changes(store, {name: open_source(source)})
        except SourceError as error:
            found.append(f"{name} cannot be read any more ({error.where}: {error.what})")
    return found


def _same(before: dict[str, Any], source: Source) -> bool:
    """Whether a source is read with the settings of before. Other settings mean other rows, and are told elsewhere."""
    now = source.model_dump(mode="json")
    return all(now.get(name) == value for name, value in before.get("settings", {}).items())


def _known(store: Store) -> dict[str, dict[str, Any]]:
    """What sources.json tells of each source, or the fingerprint of its latest plan."""
    document = store.read_json(SOURCES)
    if document is not None:
        return dict(document)
    known = {}
    for name, kind in _KINDS.items():
        plans = [read_plan(store, kind, number) for number in store.numbers(kind)]
        fingerprints = [plan.source for plan in plans if plan is not None and plan.source]
        if fingerprints:
            known[name] = {"fingerprint": fingerprints[-1]}
    return known
