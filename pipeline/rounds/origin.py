"""sources.json: the problem sources that a run was made with, so that a source which changes meanwhile is noticed.

It has an entry for `source` and one for `evaluation.source`: the source's settings, the hash of its rows, and size and time of
its files. Runs of early versions have no such file. Then the fingerprints in their plans are compared.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field, JsonValue, TypeAdapter

from pipeline.config import Run, Source
from pipeline.errors import SourceError
from pipeline.problems.sources import ProblemSet, stamps
from pipeline.problems.splits import AbsentError
from pipeline.rounds.plan import read_plan
from pipeline.store.directory import Store
from pipeline.store.documents import Count, Document, Text
from pipeline.store.names import SOURCES

_KINDS = {"source": "rounds", "evaluation.source": "evals"}
ACCEPT = "Put the old file back, use another --run, or pass --accept-changes"
Stamp = Annotated[list[Annotated[int, Field(ge=-(2**63), lt=2**63)] | None], Field(min_length=2, max_length=2)]


def _with_uri(settings: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """`settings` when they say where the source is. Raises ValueError else."""
    if "uri" not in settings:
        raise ValueError("has no uri")
    return settings


class KeptSource(Document):
    """What a run knows of one source. Only the fingerprint is known where a plan of an early version tells it.

    settings: those of the source. rows: its number of problems. files: size and time of each file, as `stamps` gives them.
    carried: hash of the columns that rewards may read and `fingerprint` leaves out. None where no reward did.
    """

    settings: dict[Text, JsonValue] = Field(default_factory=dict)
    fingerprint: Annotated[Text, Field(min_length=1)]
    rows: Count | None = None
    files: dict[str, Stamp] = Field(default_factory=dict)
    carried: Text | None = None


class _Stored(KeptSource):
    """An entry of sources.json, which always has the settings: without them another source would count as the same one."""

    settings: Annotated[dict[Text, JsonValue], AfterValidator(_with_uri)]


_SOURCES: TypeAdapter[dict[str, _Stored]] = TypeAdapter(dict[Text, _Stored])


def read_sources(store: Store) -> Mapping[str, KeptSource] | None:
    """The content of sources.json, or None where there is none. Raises StoreError for a damaged file."""
    return store.read_document(SOURCES, _SOURCES)


def keep(store: Store, opened: Mapping[str, ProblemSet], rewards: bool = False) -> None:
    """Write what the open sources are now, by the names of their settings. `rewards`: whether the run has rewards of its own."""
    now = {name: _kept(problems, rewards) for name, problems in opened.items()}
    if read_sources(store) != now:
        store.write_json(SOURCES, {name: kept.model_dump(exclude=_unsaid(kept)) for name, kept in now.items()})


def changes(store: Store, opened: Mapping[str, ProblemSet], rewards: bool = False) -> list[str]:
    """A sentence for each open source whose rows are not those that the run was made with. `rewards` as in `keep`."""
    known = _known(store)
    found = []
    for name, problems in opened.items():
        before, rows = known.get(name), ""
        if before is None or not _same(before, problems.source):
            continue
        if before.fingerprint == problems.fingerprint:
            if rewards and before.carried is not None and before.carried != problems.carried():
                what = "has other values in the columns that are kept for rewards than those the run was made with"
                found.append(f"{name} {problems.source.uri} {what}")
            continue
        if before.rows not in (None, len(problems)):
            rows = f" ({before.rows} rows before, {len(problems)} now)"
        found.append(f"{name} {problems.source.uri} has other rows than those the run was made with{rows}")
    return found


def refuse_changes(
    store: Store, opened: Mapping[str, ProblemSet], accept: bool, rewards: bool = False, remedy: str = ACCEPT
) -> list[str]:
    """The sentences of `changes` when they are accepted. Raises SourceError, with `remedy`, when they are not."""
    found = changes(store, opened, rewards)
    if found and not accept:
        raise SourceError("; ".join(found), store.uri, remedy)
    return [f"note: {text}." for text in found]


def look(store: Store, run: Run) -> list[str]:
    """A sentence for each source whose files have another size or time than before, or cannot be looked at. None is read."""
    known, found = _known(store), []
    parts = {"source": run.source} | ({"evaluation.source": run.evaluation.source} if run.evaluation.problems else {})
    for name, source in parts.items():
        before = known.get(name)
        if before is None or not before.files or not _same(before, source):
            continue
        try:
            now = stamps(source)
        except AbsentError:
            now = {}
        except SourceError as error:
            found.append(f"{name} cannot be compared with what it was ({error.where}: {error.what})")
            continue
        files = _named_as(now, before.files)
        if not now and "://" not in source.uri and not os.path.isabs(os.path.expanduser(source.uri)):
            found.append(f"{name} {source.uri} is not there, seen from {os.getcwd()}")
        elif lost := sorted(files.keys() - now.keys()):
            found.append(f"{name} {source.uri} has lost files: {', '.join(lost[:4])}")
        elif now != files:
            found.append(f"{name} {source.uri} has files of another size or time than before; a verb that opens it compares rows")
    return found


def _named_as(now: Mapping[str, object], files: Mapping[str, Stamp]) -> Mapping[str, Stamp]:
    """The `files` of before with the names that they have `now`. Early versions kept whole paths, which begin with one folder.

    As many leading folders are cut off, of those that all paths share, as gives the most of the names of now.
    """
    paths = [path.split("/") for path in files]
    shared = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, zip(*(path[:-1] for path in paths), strict=False))))
    cut = max(range(shared + 1), key=lambda cut: sum("/".join(path[cut:]) in now for path in paths))
    return {"/".join(path[cut:]): stamp for path, stamp in zip(paths, files.values(), strict=True)}


def _kept(problems: ProblemSet, rewards: bool) -> _Stored:
    return _Stored(
        settings=problems.source.reading(),
        fingerprint=problems.fingerprint,
        rows=len(problems),
        files=stamps(problems.source),
        carried=problems.carried() if rewards else None,
    )


def _unsaid(kept: KeptSource) -> set[str]:
    """The fields that are left out where they say nothing, so that the files of runs without them stay as they are."""
    return {"carried"} if kept.carried is None else set()


def _same(before: KeptSource, source: Source) -> bool:
    """Whether a source is read with the settings of before. Other settings mean other rows, and are told elsewhere."""
    now = source.model_dump(mode="json")
    return all(now.get(name) == value for name, value in before.settings.items())


def _known(store: Store) -> Mapping[str, KeptSource]:
    """What sources.json tells of each source, or the fingerprint of its latest plan."""
    stored = read_sources(store)
    if stored is not None:
        return stored
    known: dict[str, KeptSource] = {}
    for name, kind in _KINDS.items():
        plans = [read_plan(store, kind, number) for number in store.numbers(kind)]
        fingerprints = [plan.source for plan in plans if plan is not None and plan.source]
        if fingerprints:
            known[name] = KeptSource(fingerprint=fingerprints[-1])
    return known
